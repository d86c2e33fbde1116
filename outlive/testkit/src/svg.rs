//! The frame of the charts. The SVG is written by hand, because the files have to be small and follow the reader's
//! colour scheme.

use std::path::Path;

use anyhow::{Context, Result};

pub const WIDTH: usize = 860;
/// With a dark variant for readers who prefer a dark colour scheme.
const STYLE: &str = "text{font:18px sans-serif;fill:#222}.t{font-size:23px}.m{text-anchor:middle;font-size:15px}\
    .e{text-anchor:end;font-size:15px}.a{fill:#265ca0}.b{fill:#fff}.g{stroke:#999}\
    @media(prefers-color-scheme:dark){text{fill:#ddd}.a{fill:#6aa9f7}.b{fill:#0d1117}}";

/// The beginning of a chart, with its title; `style` are additional rules of this chart.
pub fn begin(title: &str, height: usize, style: &str) -> String {
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\"><title>{title}</title>\
         <style>{STYLE}{style}</style><rect class=\"b\" width=\"{WIDTH}\" height=\"{height}\"/>\
         <text class=\"t\" x=\"12\" y=\"34\">{title}</text>"
    )
}

/// Ends a chart and writes it to `path`.
pub fn end(mut svg: String, path: &Path) -> Result<()> {
    svg.push_str("</svg>\n");
    std::fs::write(path, svg).with_context(|| format!("{}", path.display()))
}
