//! The picture: the latency of every request over time, one strip a server.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use anyhow::{Result, anyhow};
use plotters::prelude::*;

use crate::restarts::Strip;

const WIDTH: u32 = 960;
const STRIP_HEIGHT: u32 = 150;
/// From a hundredth of a millisecond to ten seconds.
const LATENCIES: std::ops::Range<f64> = 0.01..10_000.0;
/// Answered requests this near to each other are drawn as one.
const COLUMNS: f64 = 320.0;
const ROWS: f64 = 50.0;

const ANSWERED: RGBColor = RGBColor(38, 92, 160);
const LOST: RGBColor = RGBColor(208, 32, 32);
const TOLD: RGBColor = RGBColor(170, 170, 170);

/// Draws the strips of the first load.
pub fn draw(strips: &[Strip], length: Duration, path: &Path) -> Result<()> {
    let first = strips.first().ok_or_else(|| anyhow!("no strips"))?.load;
    let strips: Vec<_> = strips.iter().filter(|strip| strip.load == first).collect();
    let height = STRIP_HEIGHT * u32::try_from(strips.len())?;
    let root = SVGBackend::new(path, (WIDTH, height)).into_drawing_area();
    root.fill(&WHITE)?;
    for (strip, area) in strips.iter().zip(root.split_evenly((strips.len(), 1))) {
        let lost = strip.report.lost();
        let closed = strip.report.connections.saturating_sub(strip.report.asked_for);
        let caption = format!("{}: {lost} lost, {closed} connections closed", strip.server);
        let mut chart = ChartBuilder::on(&area)
            .caption(caption, ("sans-serif", 15))
            .x_label_area_size(20)
            .y_label_area_size(60)
            .margin_right(12)
            .build_cartesian_2d(0.0..length.as_secs_f64(), LATENCIES.log_scale())?;
        chart
            .configure_mesh()
            .disable_x_mesh()
            .disable_y_mesh()
            .y_labels(4)
            .y_label_formatter(&|millis| format!("{millis} ms"))
            .x_label_formatter(&|seconds| format!("{seconds:.0} s"))
            .draw()?;
        let told = strip.told.iter().map(|at| {
            let x = at.as_secs_f64();
            PathElement::new(vec![(x, LATENCIES.start), (x, LATENCIES.end)], TOLD)
        });
        chart.draw_series(told)?;
        let column = length.as_secs_f64() / COLUMNS;
        let answered = bars(strip, length).into_iter().map(|(place, from, to)| {
            let left = f64::from(place) * column;
            Rectangle::new([(left, latency(from)), (left + column, latency(to))], ANSWERED.filled())
        });
        chart.draw_series(answered)?;
        // The lost ones last, each by itself: none of them may hide.
        let lost = strip.report.samples.iter().filter(|sample| sample.is_lost);
        chart.draw_series(lost.map(|sample| {
            let place = (f64::from(sample.at) / 1e6, f64::from(sample.took) / 1e3);
            Circle::new(place, 3, LOST.filled())
        }))?;
    }
    root.present()?;
    Ok(())
}

/// The bars that answered requests make, since there are millions: column, and from which row to which.
fn bars(strip: &Strip, length: Duration) -> Vec<(u16, u16, u16)> {
    let decades = (LATENCIES.end / LATENCIES.start).log10();
    let mut cells = BTreeSet::new();
    for sample in strip.report.samples.iter().filter(|sample| !sample.is_lost) {
        let share = f64::from(sample.at) / 1e6 / length.as_secs_f64();
        let millis = (f64::from(sample.took) / 1e3).clamp(LATENCIES.start, LATENCIES.end);
        if share < 1.0 {
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "places on paper")]
            cells.insert((
                (share * COLUMNS) as u16,
                ((millis / LATENCIES.start).log10() / decades * ROWS) as u16,
            ));
        }
    }
    let mut bars: Vec<(u16, u16, u16)> = Vec::new();
    for (column, row) in cells {
        match bars.last_mut() {
            Some((last, _, to)) if *last == column && *to == row => *to = row + 1,
            _ => bars.push((column, row, row + 1)),
        }
    }
    bars
}

/// The latency at the lower edge of a row, in milliseconds.
fn latency(row: u16) -> f64 {
    let decades = (LATENCIES.end / LATENCIES.start).log10();
    LATENCIES.start * 10_f64.powf(f64::from(row) / ROWS * decades)
}
