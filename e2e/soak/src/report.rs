//! The report: losses and waits for each event, as a Markdown table and as an SVG picture.

use std::fmt::Write;
use std::path::Path;
use std::time::Duration;

use anyhow::Result;

use crate::faults::{Cost, Event};
use crate::record::{Complaint, Seen};
use testkit::svg;

/// All occurrences of one event.
pub struct Line {
    name: &'static str,
    cost: Cost,
    answered: u64,
    lost: u64,
    closed: u64,
    /// For each occurrence, the longest wait of any client for a response.
    longest: Vec<Duration>,
    took: Duration,
}

impl Line {
    pub fn new(event: &Event) -> Self {
        let Event { name, cost, .. } = *event;
        let (longest, took) = (Vec::new(), Duration::ZERO);
        Self { name, cost, answered: 0, lost: 0, closed: 0, longest, took }
    }

    pub fn add(&mut self, seen: &Seen, took: Duration) {
        self.answered += seen.answered;
        self.lost += seen.count(Complaint::Lost);
        self.closed += seen.count(Complaint::Closed);
        self.longest.push(seen.longest);
        self.took += took;
    }

    fn median(&self) -> Duration {
        let mut longest = self.longest.clone();
        longest.sort_unstable();
        longest.get(longest.len() / 2).copied().unwrap_or_default()
    }
}

/// The columns lost and closed are sums over all occurrences.
pub fn table(name: &str, seed: u64, time: Duration, lines: &[Line]) -> String {
    let sum = |value: fn(&Line) -> u64| lines.iter().map(value).sum::<u64>();
    let (events, answered) = (sum(|line| line.longest.len() as u64), sum(|line| line.answered));
    let of_nothing = |line: &&Line| line.cost == Cost::Nothing;
    let free: usize = lines.iter().filter(of_nothing).map(|line| line.longest.len()).sum();
    let time = humantime::format_duration(time);
    let mut table = format!(
        "{name}, {time}, seed {seed}: {events} events, {answered} requests answered. Of {free} events that may cost \
         nothing, none did.\n\n\
         | event | times | may cost | lost | closed | longest wait, median | at most |\n\
         | --- | ---: | --- | ---: | ---: | ---: | ---: |\n"
    );
    for line in lines {
        let longest = line.longest.iter().max().copied().unwrap_or_default();
        let _ = writeln!(
            table,
            "| {} | {} | {} | {} | {} | {} ms | {} ms |",
            line.name,
            line.longest.len(),
            line.cost.name(),
            line.lost,
            line.closed,
            line.median().as_millis(),
            longest.as_millis(),
        );
    }
    table
}

const TOP: usize = 56;
const LEFT: usize = 400;
const ROW: usize = 24;
/// The scale of the picture is logarithmic. It begins at `SHORTEST` milliseconds and spans `DECADES` powers of ten.
const SHORTEST: f64 = 1.0;
const DECADES: f64 = 5.0;

/// Draws a row for each event, with a mark at the longest wait of each occurrence.
#[expect(clippy::cast_precision_loss, reason = "coordinates of a picture")]
pub fn draw(name: &str, lines: &[Line], path: &Path) -> Result<()> {
    let height = TOP + ROW * (lines.len() + 2);
    let style = ".n{font-size:15px}.r{fill:#d02020}path.a{stroke:#265ca0;stroke-width:2;opacity:.35}";
    let mut image = svg::begin(&format!("Soak on {name}: longest wait of any client"), height, style);
    let width = (svg::WIDTH - LEFT - 20) as f64;
    let place = |millis: f64| LEFT as f64 + (millis / SHORTEST).log10().clamp(0.0, DECADES) / DECADES * width;
    let bottom = TOP + ROW * lines.len();
    for (millis, label) in [(1.0, "1 ms"), (10.0, "10"), (100.0, "100"), (1e3, "1 s"), (1e4, "10")] {
        let x = place(millis);
        write!(image, "<path class=\"g\" d=\"M{x:.0} {TOP}V{bottom}\"/>")?;
        write!(image, "<text class=\"m\" x=\"{x:.0}\" y=\"{}\">{label}</text>", bottom + 18)?;
    }
    for (number, line) in lines.iter().enumerate() {
        let y = TOP + ROW * number;
        write!(image, "<text class=\"n\" x=\"12\" y=\"{}\">{}</text>", y + 17, line.name)?;
        image.push_str("<path class=\"a\" d=\"");
        for longest in &line.longest {
            write!(image, "M{:.0} {}v14", place(longest.as_secs_f64() * 1e3), y + 5)?;
        }
        image.push_str("\"/>");
    }
    svg::end(image, path)
}
