//! The picture: the latency of every request over time, one strip a server.

use std::collections::HashSet;
use std::path::Path;
use std::time::Duration;

use anyhow::{Result, anyhow};
use plotters::prelude::*;

use crate::restarts::Strip;

const WIDTH: u32 = 960;
const STRIP_HEIGHT: u32 = 150;
/// From a hundredth of a millisecond to ten seconds.
const LATENCIES: std::ops::Range<f64> = 0.01..10_000.0;
/// Requests this near to each other are one dot, in pixels: there are millions.
const GRAIN: f64 = 2.0;

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
        // The lost ones last, and larger: none of them may hide.
        for (is_lost, color, size) in [(false, ANSWERED, 1), (true, LOST, 3)] {
            let dots = dots(strip, is_lost, length).into_iter();
            chart.draw_series(dots.map(|dot| Circle::new(dot, size, color.filled())))?;
        }
    }
    root.present()?;
    Ok(())
}

/// Where requests are to be drawn: seconds, and milliseconds.
fn dots(strip: &Strip, is_lost: bool, length: Duration) -> Vec<(f64, f64)> {
    let columns = f64::from(WIDTH) / GRAIN;
    let rows = f64::from(STRIP_HEIGHT) / GRAIN;
    let decades = (LATENCIES.end / LATENCIES.start).log10();
    let mut seen = HashSet::new();
    let mut dots = Vec::new();
    for sample in strip.report.samples.iter().filter(|sample| sample.is_lost == is_lost) {
        let seconds = f64::from(sample.at) / 1e6;
        let millis = (f64::from(sample.took) / 1e3).clamp(LATENCIES.start, LATENCIES.end);
        if seconds > length.as_secs_f64() {
            continue;
        }
        #[expect(clippy::cast_possible_truncation, reason = "a place on the paper")]
        let place = (
            (seconds / length.as_secs_f64() * columns) as i32,
            ((millis / LATENCIES.start).log10() / decades * rows) as i32,
        );
        if seen.insert(place) {
            dots.push((seconds, millis));
        }
    }
    dots
}
