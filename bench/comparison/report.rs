//! The result as Markdown tables, for the terminal and for bench/README.md.

use std::fmt::Write;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::servers::FOLDER;

const BEGIN: &str = "<!-- make bench-readme writes from here -->";
const END: &str = "<!-- to here -->";

/// Processor, cores, kernel, systemd.
pub fn machine() -> Result<String> {
    let processors = std::fs::read_to_string("/proc/cpuinfo")?;
    let field = processors.lines().find_map(|line| line.strip_prefix("model name"));
    let processor = field.map_or("a processor", |line| line.trim_start_matches([' ', '\t', ':']));
    let cores = std::thread::available_parallelism()?;
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let systemd = std::process::Command::new("systemctl").arg("--version").output()?;
    let systemd = String::from_utf8_lossy(&systemd.stdout);
    let systemd = systemd.split_whitespace().nth(1).unwrap_or("?");
    Ok(format!(
        "{cores} cores of {processor}, Linux {}, systemd {systemd}, client on the same machine",
        kernel.trim()
    ))
}

/// All tables as Markdown, which is readable on a terminal too.
pub fn table(result: &Value) -> String {
    let mut text = String::new();
    let _ = writeln!(
        text,
        "`{}` on {}; {} s under each load, one restart or reload per second.\n",
        plain(&result["command"]),
        plain(&result["machine"]),
        plain(&result["seconds under each load"]),
    );
    text.push_str(&tables(result));
    let pause = &result["costs"]["pause"];
    for name in [
        "this service ms",
        "sleep in the same sandbox ms",
        "beyond systemd's own ms",
        "sleep without a sandbox ms",
    ] {
        let _ = writeln!(
            text,
            "- inactive during a restart, {}: {} ms",
            name.trim_end_matches(" ms"),
            plain(&pause[name])
        );
    }
    for (heading, value) in pause["each group of the sandbox's lines ms"].as_object().into_iter().flatten() {
        let _ = writeln!(
            text,
            "- added to the sleep without a sandbox by \"{heading}\" alone (a negative value is noise): {} ms",
            plain(value)
        );
    }
    for left_out in result["left out"].as_array().into_iter().flatten() {
        let _ = writeln!(text, "- left out: {}", plain(left_out));
    }
    text
}

/// The tables of what was measured.
pub fn tables(result: &Value) -> String {
    let mut text = String::new();
    rows(
        &mut text,
        &result["restarts"],
        &[
            "server",
            "load",
            "answered",
            "lost",
            "connections closed",
            "p50 ms",
            "p99 ms",
            "p99.9 ms",
            "longest ms",
            "verb ms",
        ]
        .map(str::to_owned),
    );
    titled_rows(
        &mut text,
        "Upgrades of a Debian package, one after the other; the package of bare axum::serve has the defaults of cargo-deb.",
        &result["upgrades"],
        &["package", "load", "upgrades", "answered", "lost", "connections closed", "longest ms"]
            .map(str::to_owned),
    );
    let throughput = &result["throughput"];
    let of = |ratio: &str| {
        ["server", "requests per second", ratio, "middle half of the rounds"].map(str::to_owned)
    };
    titled_rows(
        &mut text,
        "Throughput measured by wrk on 64 connections, server and client on the same cores; ratios of the same rounds.",
        &throughput["beside"],
        &of("relative to bare axum::serve"),
    );
    titled_rows(
        &mut text,
        "Requests per second by the number of connections, the server on one core and the client on another.",
        &throughput["growth"],
        &columns_of(&throughput["growth"]),
    );
    titled_rows(
        &mut text,
        "Accepted connections per second, one request on each, 100 at a time; the server on one core and the client on another; ratios of the same rounds.",
        &throughput["accepting"],
        &["server", "connections per second", "relative to bare axum::serve", "middle half of the rounds"]
            .map(str::to_owned),
    );
    titled_rows(
        &mut text,
        "User instructions for one request, counted by callgrind: one worker thread, one connection, one request at a time.",
        &throughput["instructions"],
        &["server", "HTTP/1.1", "HTTP/2"].map(str::to_owned),
    );
    titled_rows(
        &mut text,
        "Messages on 8 WebSockets that are echoed, many at a time; one core each for server and client; ratios of the same rounds.",
        &result["websockets"],
        &[
            "server",
            "messages",
            "messages per second of processor time",
            "relative to without Carry",
            "middle half of the rounds",
        ]
        .map(str::to_owned),
    );
    let idle = &result["idle"];
    titled_rows(
        &mut text,
        "Memory of idle connections, measured once it is stable or after 10 s.",
        &idle["memory"],
        &["server", "connections", "resident bytes each", "after one request on all at once"]
            .map(str::to_owned),
    );
    titled_rows(
        &mut text,
        "Restarts and reloads with idle connections, and the longest wait on 50 busy connections meanwhile; medians.",
        &idle["moves"],
        &MOVES.map(str::to_owned),
    );
    titled_rows(
        &mut text,
        "Latency of a request after 4 s without one (this service has parked the connection), and of a second request right after; one core each for server and client; medians of rounds, in microseconds.",
        &idle["woken"],
        &["server", "p50 idle", "p50 second request", "p99 idle", "p99 second request"].map(str::to_owned),
    );
    let costs = &result["costs"];
    rows(
        &mut text,
        &costs["processes"],
        &["server", "exec to READY ms", "resident MB", "binary kB"].map(str::to_owned),
    );
    text
}

/// The columns of the table of restarts and reloads with idle connections.
const MOVES: [&str; 7] = [
    "idle connections",
    "restart ms",
    "restart, relative to none",
    "restart: longest wait ms",
    "reload ms",
    "reload, relative to none",
    "reload: longest wait ms",
];

/// The columns of the first row: the number of connections, then this service, then the others.
fn columns_of(rows: &Value) -> Vec<String> {
    let mut columns: Vec<String> =
        rows[0].as_object().into_iter().flatten().map(|(key, _)| key.clone()).collect();
    columns.sort_by_key(|column| (column != "connections", column != "this service"));
    columns
}

fn titled_rows(text: &mut String, title: &str, of: &Value, columns: &[String]) {
    if of.is_array() {
        let _ = writeln!(text, "{title}\n");
        rows(text, of, columns);
    }
}

fn rows(text: &mut String, rows: &Value, columns: &[String]) {
    let Some(rows) = rows.as_array() else { return };
    let _ = writeln!(text, "| {} |\n|{}", columns.join(" | "), " --- |".repeat(columns.len()));
    for row in rows {
        let cells: Vec<String> = columns.iter().map(|column| plain(&row[column])).collect();
        let _ = writeln!(text, "| {} |", cells.join(" | "));
    }
    text.push('\n');
}

fn plain(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::String(text) => text.clone(),
        Value::Number(number) => number.to_string().trim_end_matches(".0").to_owned(),
        value => value.to_string(),
    }
}

/// Replaces the tables in bench/README.md, and copies the pictures to bench/.
pub fn write_readme(table: &str, pictures: &[&Path]) -> Result<()> {
    for picture in pictures {
        let name = picture.file_name().context("the picture has no name")?;
        std::fs::copy(picture, Path::new(FOLDER).join("bench").join(name))?;
    }
    let path = Path::new(FOLDER).join("bench/README.md");
    let text = std::fs::read_to_string(&path)?;
    let (before, rest) = text.split_once(BEGIN).with_context(|| format!("no {BEGIN} in the README"))?;
    let (_, after) = rest.split_once(END).with_context(|| format!("no {END} in the README"))?;
    let picture = "![Latency of every request over time](restarts.svg)\n\n\
        ![Requests per second by the number of connections](growth.svg)";
    Ok(std::fs::write(path, format!("{before}{BEGIN}\n\n{picture}\n\n{table}\n{END}{after}"))?)
}

/// Puts rows of the same tables into bench/README.md: a row replaces the one that begins with the same two cells, or
/// follows the last one of the same server.
pub fn replace_rows(tables: &str) -> Result<()> {
    let path = Path::new(FOLDER).join("bench/README.md");
    let mut lines: Vec<String> = std::fs::read_to_string(&path)?.lines().map(str::to_owned).collect();
    for table in tables.split("\n\n").filter(|table| table.starts_with('|')) {
        let (head, rows) = table.split_once('\n').context("a table has no rows")?;
        let begin = lines.iter().position(|line| line == head).with_context(|| format!("no table {head}"))?;
        for row in rows.lines().skip(1) {
            let cells: Vec<&str> = row.split(" | ").collect();
            let end = begin + lines[begin..].iter().take_while(|line| line.starts_with('|')).count();
            let last = |prefix: &str| (begin..end).rev().find(|line| lines[*line].starts_with(prefix));
            if let Some(same) = last(&format!("{} | {} |", cells[0], cells[1])) {
                row.clone_into(&mut lines[same]);
            } else {
                let after = last(&format!("{} |", cells[0])).unwrap_or(end - 1);
                lines.insert(after + 1, row.to_owned());
            }
        }
    }
    Ok(std::fs::write(path, lines.join("\n") + "\n")?)
}
