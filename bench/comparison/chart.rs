//! The picture restarts.svg: the latency of every request during a few restarts, with one panel for each server, and a
//! panel with the WebSockets that had to reconnect.

use std::fmt::Write;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::restarts::{Strip, WEBSOCKETS};
use crate::servers::{BARE_RESTARTED, GO_HUNG_UP, OURS_RELOADED, OURS_RESTARTED};
use testkit::svg;

const TITLE: &str = "Restarted each second under load: answered in blue, lost in red";
/// The servers that are shown, under the first load.
const PANELS: [&str; 4] = [OURS_RESTARTED, OURS_RELOADED, BARE_RESTARTED, GO_HUNG_UP];
/// The part of the load that is shown. The first second is skipped, because the clients connect then.
const SHOWN: Duration = Duration::from_secs(5);
const SKIPPED: Duration = Duration::from_secs(1);

/// The grid of a panel: columns of time, and rows of latency with two rows for each power of ten.
const COLUMNS: usize = 125;
const ROWS: usize = 10;
/// The latency at the lower edge of the grid, in milliseconds.
const FASTEST: f64 = 0.01;
/// A time without requests that is labelled as a pause, in microseconds.
const PAUSE: u32 = 20_000;

/// The servers in the panel of WebSockets.
const LANES: [(&str, &str); 2] = [("this service", OURS_RESTARTED), ("bare axum", BARE_RESTARTED)];
/// The height of a lane, the distance between two, and the width of its columns of time.
const LANE: usize = 44;
const LANES_APART: usize = 68;
const LANE_COLUMN: usize = 2;
/// The beginning of the panel of WebSockets, which is the last one.
const LAST_PANEL: &str = "<g id=\"websockets\"";

const LEFT: usize = 90;
const TOP: usize = 56;
const PANEL: usize = 176;
/// Width and height of a cell of the grid.
const CELL: (usize, usize) = (6, 12);

const STYLE: &str = ".r{fill:#d02020;font-weight:bold}.g{stroke-dasharray:3 3}.f{fill:#8881}.l{fill:#d02020}\
    .w{fill:#fff;font-weight:bold}@media(prefers-color-scheme:dark){.r{fill:#ff6a6a}}";

/// Draws the panels.
pub fn draw(strips: &[Strip], length: Duration, path: &Path) -> Result<()> {
    let first = strips.first().context("no strips")?.load;
    let mut panels = String::new();
    let mut count = 0;
    for server in PANELS {
        let Some(strip) = find(strips, first, server) else { continue };
        write!(panels, "<g transform=\"translate({LEFT} {})\">", TOP + PANEL * count)?;
        panel(&mut panels, strip, shown_from(length))?;
        panels.push_str("</g>");
        count += 1;
    }
    finish(panels, count, strips, length, path)
}

/// Draws the panel of WebSockets anew in an existing picture.
pub fn replace_websockets(strips: &[Strip], length: Duration, path: &Path) -> Result<()> {
    let picture = std::fs::read_to_string(path).with_context(|| format!("{}", path.display()))?;
    let panel = format!("<g transform=\"translate({LEFT} ");
    let begin = picture.find(&panel).context("the picture has no panels")?;
    let end =
        picture.find(LAST_PANEL).or_else(|| picture.find("</svg>")).context("the picture has no end")?;
    let panels = picture[begin..end].to_owned();
    let count = panels.matches(&panel).count();
    finish(panels, count, strips, length, path)
}

/// Adds the panel of WebSockets to the other panels, and writes the picture.
fn finish(mut panels: String, count: usize, strips: &[Strip], length: Duration, path: &Path) -> Result<()> {
    write!(panels, "{LAST_PANEL} transform=\"translate({LEFT} {})\">", TOP + PANEL * count)?;
    websockets(&mut panels, strips, shown_from(length))?;
    panels.push_str("</g>");
    svg::end(svg::begin(TITLE, TOP + PANEL * (count + 1), STYLE) + &panels, path)
}

fn find<'a>(strips: &'a [Strip], load: &str, server: &str) -> Option<&'a Strip> {
    strips.iter().find(|strip| strip.load == load && strip.server == server)
}

/// The first moment that is shown of a load of this length.
fn shown_from(length: Duration) -> Duration {
    if length > SHOWN { SKIPPED } else { Duration::ZERO }
}

/// The horizontal position of a moment of the load, in microseconds; None if it is not shown.
#[expect(clippy::cast_precision_loss, reason = "coordinates of a picture")]
fn place(at: u32, begin: Duration) -> Option<f64> {
    let at = Duration::from_micros(at.into()).checked_sub(begin).filter(|at| *at < SHOWN)?;
    Some(at.as_secs_f64() / SHOWN.as_secs_f64() * (COLUMNS * CELL.0) as f64)
}

fn micros(at: &Duration) -> u32 {
    u32::try_from(at.as_micros()).unwrap_or(u32::MAX)
}

/// A lane for each server: when messages were answered, and how many WebSockets connected again after each restart.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "coordinates of a picture")]
fn websockets(svg: &mut String, strips: &[Strip], begin: Duration) -> Result<()> {
    let width = COLUMNS * CELL.0;
    write!(svg, "<text y=\"16\">{WEBSOCKETS}, systemctl restart</text>")?;
    let mut said = Vec::new();
    for (number, (label, server)) in LANES.into_iter().enumerate() {
        let Some(strip) = find(strips, WEBSOCKETS, server) else { continue };
        write!(
            svg,
            "<g transform=\"translate(0 {})\"><rect class=\"f\" width=\"{width}\" height=\"{LANE}\"/>",
            24 + LANES_APART * number
        )?;
        // One word below the other, because the margin is narrow.
        for (line, word) in label.split(' ').enumerate() {
            write!(svg, "<text class=\"e\" x=\"-8\" y=\"{}\">{word}</text>", 19 + 18 * line)?;
        }
        let mut answered = [false; COLUMNS * CELL.0 / LANE_COLUMN];
        for sample in strip.report.samples.iter().filter(|sample| !sample.is_lost) {
            if let Some(x) = place(sample.at, begin) {
                answered[x as usize / LANE_COLUMN] = true;
            }
        }
        svg.push_str("<path class=\"a\" d=\"");
        let mut column = 0;
        while column < answered.len() {
            let length = answered[column..].iter().take_while(|answered| **answered).count();
            if length > 0 {
                let (x, width) = (column * LANE_COLUMN, length * LANE_COLUMN);
                write!(svg, "M{x} 0h{width}v{LANE}h-{width}z")?;
            }
            column += length.max(1);
        }
        svg.push_str("\"/>");
        for (number, restart) in strip.restarts.iter().enumerate() {
            let end = strip.restarts.get(number + 1).map_or(u32::MAX, micros);
            let opened = strip.report.samples.iter().filter(|sample| sample.opens);
            let again = opened.filter(|sample| (micros(restart)..end).contains(&sample.at)).count();
            if let Some(x) = place(micros(restart), begin) {
                write!(svg, "<path class=\"g\" d=\"M{x:.0} 0v{LANE}\"/>")?;
                circle(svg, x, LANE / 2, again)?;
            }
        }
        svg.push_str("</g>");
        let again = strip.report.connections.saturating_sub(strip.report.clients);
        let class = if again > 0 { " class=\"r\"" } else { "" };
        said.push(format!("<tspan{class}>{label} {again}</tspan>"));
    }
    let said = said.join(", ");
    Ok(write!(svg, "<text x=\"{width}\" y=\"16\" text-anchor=\"end\">reconnects: {said}</text>")?)
}

/// A circle with a number; nothing if it is zero.
fn circle(svg: &mut String, x: f64, y: usize, number: usize) -> Result<()> {
    if number > 0 {
        write!(
            svg,
            "<circle class=\"l\" cx=\"{x:.0}\" cy=\"{y}\" r=\"17\"/>\
             <text class=\"m w\" x=\"{x:.0}\" y=\"{}\">{number}</text>",
            y + 6
        )?;
    }
    Ok(())
}

fn panel(svg: &mut String, strip: &Strip, begin: Duration) -> Result<()> {
    let (width, height) = (COLUMNS * CELL.0, ROWS * CELL.1);
    let lost = strip.report.lost();
    let closed = strip.report.connections.saturating_sub(strip.report.clients);
    let class = if lost + closed > 0 { " class=\"r\"" } else { "" };
    write!(
        svg,
        "<text y=\"16\">{}</text><text x=\"{width}\" y=\"16\" text-anchor=\"end\"{class}>{lost} lost, {closed} \
         connections closed</text><g transform=\"translate(0 24)\"><rect class=\"f\" width=\"{width}\" height=\"{height}\"/>",
        strip.server
    )?;
    for (row, label) in [(0, "1 s"), (4, "10 ms"), (8, "0.1 ms")] {
        write!(svg, "<text class=\"e\" x=\"-8\" y=\"{}\">{label}</text>", row * CELL.1 + 12)?;
    }
    let place = |at: u32| place(at, begin);
    for x in strip.restarts.iter().filter_map(|at| place(micros(at))) {
        write!(svg, "<path class=\"g\" d=\"M{x:.0} 0v{height}\"/>")?;
    }
    svg.push_str(&cells(strip, place));
    let mut sent: Vec<u32> = strip.report.samples.iter().map(|sample| sample.at).collect();
    sent.sort_unstable();
    for gap in sent.windows(2).filter(|gap| gap[1] - gap[0] >= PAUSE) {
        if let Some(x) = place(gap[0]) {
            let millis = (gap[1] - gap[0]) / 1000;
            write!(svg, "<text class=\"m\" x=\"{x:.0}\" y=\"{}\">{millis} ms</text>", height + 15)?;
        }
    }
    // One circle with the count for each restart. Single marks would hide each other.
    for (number, restart) in strip.restarts.iter().enumerate() {
        let end = strip.restarts.get(number + 1).map_or(u32::MAX, micros);
        let is_here = |at: u32| at < end && (number == 0 || at >= micros(restart));
        let lost = strip.report.samples.iter().filter(|sample| sample.is_lost && is_here(sample.at)).count();
        if let Some(x) = place(micros(restart)) {
            circle(svg, x, 30, lost)?;
        }
    }
    svg.push_str("</g>");
    Ok(())
}

/// Answered requests as four shades, by the share that a cell has of the requests of its column. Each shade is one SVG
/// path, which keeps the file small.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    clippy::cast_sign_loss,
    reason = "coordinates of a picture"
)]
fn cells(strip: &Strip, place: impl Fn(u32) -> Option<f64>) -> String {
    let mut counts = vec![[0_u32; ROWS]; COLUMNS];
    for sample in strip.report.samples.iter().filter(|sample| !sample.is_lost) {
        let Some(x) = place(sample.at) else { continue };
        let millis = f64::from(sample.took) / 1e3;
        let row = ((millis / FASTEST).log10() * 2.0).clamp(0.0, ROWS as f64 - 1.0) as usize;
        counts[(x as usize / CELL.0).min(COLUMNS - 1)][ROWS - 1 - row] += 1;
    }
    let shade = |column: usize, row: usize| {
        let (all, here) = (counts[column].iter().sum::<u32>(), counts[column][row]);
        let share = f64::from(here) / f64::from(all.max(1));
        [0.0, 0.002, 0.02, 0.2].iter().filter(|least| share > **least).count()
    };
    let mut paths = String::new();
    for (level, opacity) in [(1, "0.2"), (2, "0.4"), (3, "0.7"), (4, "1")] {
        let _ = write!(paths, "<path class=\"a\" opacity=\"{opacity}\" d=\"");
        for row in 0..ROWS {
            let mut column = 0;
            while column < COLUMNS {
                let length = (column..COLUMNS).take_while(|column| shade(*column, row) == level).count();
                if length > 0 {
                    let (x, y, width) = (column * CELL.0, row * CELL.1, length * CELL.0);
                    let _ = write!(paths, "M{x} {y}h{width}v{}h-{width}z", CELL.1);
                }
                column += length.max(1);
            }
        }
        paths.push_str("\"/>");
    }
    paths
}
