//! The picture restarts.svg: the latency of every request during a few restarts, with one panel for each server.

use std::fmt::Write;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::restarts::Strip;
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
    let of = |server: &str| strips.iter().find(|strip| strip.load == first && strip.server == server);
    let shown: Vec<&Strip> = PANELS.iter().filter_map(|server| of(server)).collect();
    let height = TOP + PANEL * shown.len();
    let mut svg = svg::begin(TITLE, height, STYLE);
    let begin = if length > SHOWN { SKIPPED } else { Duration::ZERO };
    for (number, strip) in shown.into_iter().enumerate() {
        let top = TOP + PANEL * number;
        write!(svg, "<g transform=\"translate({LEFT} {top})\">")?;
        panel(&mut svg, strip, begin)?;
        svg.push_str("</g>");
    }
    svg::end(svg, path)
}

#[expect(clippy::cast_precision_loss, reason = "coordinates of a picture")]
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
    let place = |at: u32| {
        let at = Duration::from_micros(at.into()).checked_sub(begin).filter(|at| *at < SHOWN)?;
        Some(at.as_secs_f64() / SHOWN.as_secs_f64() * width as f64)
    };
    let micros = |at: &Duration| u32::try_from(at.as_micros()).unwrap_or(u32::MAX);
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
        if let Some(x) = place(micros(restart)).filter(|_| lost > 0) {
            write!(
                svg,
                "<circle class=\"l\" cx=\"{x:.0}\" cy=\"30\" r=\"17\"/><text class=\"m w\" x=\"{x:.0}\" y=\"36\">{lost}</text>"
            )?;
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
