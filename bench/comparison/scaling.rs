//! The picture growth.svg: requests per second by the number of connections, with a line for each server.

use std::fmt::Write;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::Value;

use testkit::svg;

const HEIGHT: usize = 420;
/// The edges of the plot area.
const LEFT: f64 = 70.0;
const RIGHT: f64 = 680.0;
const TOP: f64 = 66.0;
const BOTTOM: f64 = 372.0;
/// Minimum distance between two labels at the ends of lines.
const LINE: f64 = 20.0;
/// Requests per second between two grid lines.
const STEP: f64 = 50_000.0;

/// The line of this service is thick.
const STYLE: &str = "polyline{fill:none;stroke-width:2}.c0{stroke:#265ca0;stroke-width:5}.c1{stroke:#c8641e}\
    .c2{stroke:#2a8a57}.c3{stroke:#888}@media(prefers-color-scheme:dark){.c0{stroke:#6aa9f7}}";
const TITLE: &str = "Requests per second on one core, by the number of connections";

/// Draws `rows`, which has one row for each number of connections and one column for each server.
pub fn draw(rows: &Value, path: &Path) -> Result<()> {
    let rows = rows.as_array().context("the rows are not an array")?;
    let counts: Vec<f64> = rows.iter().filter_map(|row| row["connections"].as_f64()).collect();
    let (fewest, most) =
        (counts.first().context("no rows")?.log10(), counts.last().context("no rows")?.log10());
    let mut servers: Vec<&String> = rows[0]
        .as_object()
        .context("the row is not an object")?
        .keys()
        .filter(|key| *key != "connections")
        .collect();
    servers.sort_by_key(|server| *server != "this service");
    let rates = |server: &str| rows.iter().map(|row| row[server].as_f64().unwrap_or(0.0)).collect::<Vec<_>>();
    let highest = servers.iter().flat_map(|server| rates(server)).fold(STEP, f64::max);
    let x = |count: f64| LEFT + (RIGHT - LEFT) * (count.log10() - fewest) / (most - fewest).max(1.0);
    let y = |rate: f64| BOTTOM - (BOTTOM - TOP) * rate / highest;

    let mut svg = svg::begin(TITLE, HEIGHT, STYLE);
    let mut rate = 0.0;
    while rate <= highest {
        let y = y(rate);
        write!(
            svg,
            "<path class=\"g\" d=\"M{LEFT} {y:.0}H{RIGHT}\"/><text class=\"e\" x=\"{:.0}\" y=\"{:.0}\">{:.0} k</text>",
            LEFT - 8.0,
            y + 5.0,
            rate / 1000.0
        )?;
        rate += STEP;
    }
    for count in &counts {
        let x = x(*count);
        write!(svg, "<text class=\"m\" x=\"{x:.0}\" y=\"{:.0}\">{count}</text>", BOTTOM + 24.0)?;
    }
    // From the highest line down, so that a label that would cover the previous one can be moved down.
    let mut lines: Vec<(usize, &String, Vec<f64>)> =
        servers.into_iter().enumerate().map(|(number, server)| (number, server, rates(server))).collect();
    lines.sort_by(|(_, _, one), (_, _, other)| {
        other.last().partial_cmp(&one.last()).expect("the rates are comparable")
    });
    let mut label = 0.0;
    for (number, server, rates) in lines {
        let points: Vec<String> = counts
            .iter()
            .zip(&rates)
            .map(|(count, rate)| format!("{:.0},{:.0}", x(*count), y(*rate)))
            .collect();
        label = y(*rates.last().context("no rates")?).max(label + LINE);
        write!(
            svg,
            "<polyline class=\"c{number}\" points=\"{}\"/><text x=\"{:.0}\" y=\"{:.0}\">{server}</text>",
            points.join(" "),
            RIGHT + 12.0,
            label + 5.0
        )?;
    }
    svg::end(svg, path)
}
