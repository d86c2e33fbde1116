//! The result as tables: for the terminal, and for the benchmark's README.

use std::fmt::Write;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::Value;

const FOLDER: &str = env!("CARGO_MANIFEST_DIR");
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

/// Markdown, which reads well on a terminal too.
pub fn table(result: &Value) -> String {
    let mut text = String::new();
    let _ = writeln!(
        text,
        "`{}` on {}; {} s under each load, started anew each second.\n",
        plain(&result["command"]),
        plain(&result["machine"]),
        plain(&result["seconds under each load"]),
    );
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
        ],
    );
    let costs = &result["costs"];
    rows(
        &mut text,
        &costs["throughput"],
        &["server", "requests a second", "of bare axum::serve", "half of the rounds"],
    );
    rows(
        &mut text,
        &costs["processes"],
        &[
            "server",
            "exec to READY ms",
            "resident MB",
            "idle connections",
            "resident MB with idle connections",
            "bytes a connection",
            "binary kB",
        ],
    );
    let pause = &costs["pause"];
    for (name, value) in costs["restart ms by idle connections"].as_object().into_iter().flatten() {
        let _ = writeln!(text, "- `systemctl restart` with {name} idle connections: {} ms", plain(value));
    }
    for name in [
        "this service ms",
        "sleep in the same sandbox ms",
        "beyond systemd's own ms",
        "sleep without a sandbox ms",
    ] {
        let _ = writeln!(
            text,
            "- a restart leaves not active, {}: {} ms",
            name.trim_end_matches(" ms"),
            plain(&pause[name])
        );
    }
    for (heading, value) in pause["each group of the sandbox's lines ms"].as_object().into_iter().flatten() {
        let _ = writeln!(text, "- of that, \"{heading}\" alone costs {} ms", plain(value));
    }
    for left_out in result["left out"].as_array().into_iter().flatten() {
        let _ = writeln!(text, "- left out: {}", plain(left_out));
    }
    text
}

fn rows(text: &mut String, rows: &Value, columns: &[&str]) {
    let Some(rows) = rows.as_array() else { return };
    let _ = writeln!(text, "| {} |\n|{}", columns.join(" | "), " --- |".repeat(columns.len()));
    for row in rows {
        let cells: Vec<String> = columns.iter().map(|column| plain(&row[*column])).collect();
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

/// Puts the table into its README, and the picture beside the benchmark.
pub fn write_readme(table: &str, svg: &Path) -> Result<()> {
    std::fs::copy(svg, Path::new(FOLDER).join("benches/restarts.svg"))?;
    let path = Path::new(FOLDER).join("benches/README.md");
    let text = std::fs::read_to_string(&path)?;
    let (before, rest) = text.split_once(BEGIN).with_context(|| format!("no {BEGIN} in the README"))?;
    let (_, after) = rest.split_once(END).with_context(|| format!("no {END} in the README"))?;
    let picture = "![Latency of every request over time](restarts.svg)";
    Ok(std::fs::write(path, format!("{before}{BEGIN}\n\n{picture}\n\n{table}\n{END}{after}"))?)
}
