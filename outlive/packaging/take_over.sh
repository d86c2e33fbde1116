# Reloads the running service and its running instances, so that the version that was just installed takes over. If the new
# version cannot start, this prints the reason and fails, and the old process keeps serving. The arguments are the command
# that reloads a unit.
take_over() {
    for service in $(systemctl list-units --plain --no-legend --state=active,reloading '@NAME@.service' '@NAME@@*.service' | cut --delimiter=' ' --fields=1); do
        if [ "$(systemctl show --property=LoadState --value "$service")" = masked ]; then
            # systemd ignores the notifications of a masked unit's process, WATCHDOG=1 included.
            echo "$service is masked, so it was not upgraded. systemd ignores the messages of a masked service, so its watchdog will soon kill the old process. To run the new version: systemctl unmask $service && systemctl restart $service" >&2
            continue
        fi
        begun=$(date +%s)
        if variables_can_be_read "$service" && "$@" "$service"; then
            continue
        fi
        # The last messages may not have reached the journal yet.
        journalctl --sync || true
        said=$(journalctl --quiet --unit="$service" --since="@$begun" --priority=warning --output=cat || true)
        echo "$said" >&2
        for variable in $(echo "$said" | grep --only-matching '@VARIABLE@_[A-Z0-9_]*' | sort --unique); do
            grep --with-filename --line-number "^$variable=" /etc/default/@NAME@* >&2 || true
        done
        echo "$service: the new version failed to start; the old process keeps serving" >&2
        return 1
    done
}

# systemd ignores an EnvironmentFile=- that it cannot read, so the service would start with the wrong configuration.
variables_can_be_read() {
    for file in /etc/default/@NAME@ "/etc/default/${1%.service}"; do
        [ ! -e "$file" ] || cat "$file" >/dev/null || return 1
    done
}
