//! The picture: one panel per policy, share of reads served by each tier over time.

use super::{Read, Served};
use forebay_common::{Result, err};
use plotters::prelude::*;
use std::path::Path;

/// Points along a line.
const POINTS: usize = 100;
const MEM: RGBColor = RGBColor(0x1b, 0x7f, 0x5c);
const SSD: RGBColor = RGBColor(0x2f, 0x6f, 0xb5);
const MISSED: RGBColor = RGBColor(0xb4, 0x3a, 0x2a);

fn line(reads: &[Read], served: &[Served], what: Served) -> Vec<(f64, f64)> {
    let width = (reads.len() / POINTS).max(1);
    (0..reads.len())
        .step_by(width)
        .filter_map(|from| {
            let own: Vec<usize> = (from..(from + width).min(reads.len())).filter(|i| !reads[*i].scan).collect();
            let share = super::percent(own.iter().filter(|i| served[**i] == what).count(), own.len());
            (!own.is_empty()).then_some((from as f64, share))
        })
        .collect()
}

/// Errors: the file cannot be written.
pub fn draw(path: &Path, reads: &[Read], runs: &[(&str, Vec<Served>, Vec<Served>)]) -> Result<()> {
    let failed = |e: DrawingAreaErrorKind<std::io::Error>| err!(Internal, "drawing {}: {e}", path.display());
    let area = SVGBackend::new(path, (900, 260 * runs.len() as u32 + 30)).into_drawing_area();
    area.fill(&WHITE).map_err(failed)?;
    let area = area.titled("reads served by each tier, in % (shaded: a scan is read as well)", ("sans-serif", 18)).map_err(failed)?;
    let scan = (reads.iter().position(|r| r.scan), reads.iter().rposition(|r| r.scan));
    for (panel, (name, served, simulated)) in area.split_evenly((runs.len(), 1)).iter().zip(runs) {
        let mut chart = ChartBuilder::on(panel)
            .margin(10)
            .caption(*name, ("sans-serif", 16))
            .x_label_area_size(28)
            .y_label_area_size(40)
            .build_cartesian_2d(0.0..reads.len() as f64, 0.0..100.0)
            .map_err(failed)?;
        chart.configure_mesh().x_desc("reads").light_line_style(TRANSPARENT).draw().map_err(failed)?;
        if let (Some(from), Some(to)) = scan {
            let shade = Rectangle::new([(from as f64, 0.0), (to as f64, 100.0)], BLACK.mix(0.08).filled());
            chart.draw_series([shade]).map_err(failed)?;
        }
        for (label, color, what) in [("MEM", MEM, Served::Mem), ("SSD", SSD, Served::Ssd), ("missed", MISSED, Served::Missed)] {
            chart
                .draw_series(LineSeries::new(line(reads, served, what), color.stroke_width(2)))
                .map_err(failed)?
                .label(label)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], color.stroke_width(2)));
        }
        chart
            .draw_series(DashedLineSeries::new(line(reads, simulated, Served::Mem), 4, 4, MEM.stroke_width(1)))
            .map_err(failed)?
            .label("MEM, simulated")
            .legend(|(x, y)| PathElement::new([(x, y), (x + 16, y)], MEM.stroke_width(1)));
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::MiddleRight)
            .background_style(WHITE.mix(0.8))
            .border_style(BLACK.mix(0.2))
            .draw()
            .map_err(failed)?;
    }
    area.present().map_err(failed)
}
