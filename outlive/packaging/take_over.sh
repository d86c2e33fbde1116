# What is running, the service and its instances, is taken over by the release that was just installed. Where that cannot
# start, the old one serves on: this says why, and fails. Its arguments: the command that reloads a unit.
take_over() {
    for service in $(systemctl list-units --plain --no-legend --state=active,reloading '@NAME@.service' '@NAME@@*.service' | cut --delimiter=' ' --fields=1); do
        if [ "$(systemctl show --property=LoadState --value "$service")" = masked ]; then
            echo "$service is masked: the old release serves on" >&2
            continue
        fi
        begun=$(date +%s)
        if variables_can_be_read "$service" && "$@" "$service"; then
            continue
        fi
        # What was just said may be on its way yet.
        journalctl --sync || true
        said=$(journalctl --quiet --unit="$service" --since="@$begun" --priority=warning --output=cat || true)
        echo "$said" >&2
        for variable in $(echo "$said" | grep --only-matching '@VARIABLE@_[A-Z0-9_]*' | sort --unique); do
            grep --with-filename --line-number "^$variable=" /etc/default/@NAME@* >&2 || true
        done
        echo "$service: the new release does not start, and the old one serves on" >&2
        return 1
    done
}

# systemd would go on without a file that it cannot read.
variables_can_be_read() {
    for file in /etc/default/@NAME@ "/etc/default/${1%.service}"; do
        [ ! -e "$file" ] || cat "$file" >/dev/null || return 1
    done
}
