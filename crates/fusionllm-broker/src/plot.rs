//! The run's plot: loss against bytes sent.

use fusionllm_protocol::StepMetrics;
use plotters::prelude::*;

/// Size in pixels.
const SIZE: (u32, u32) = (760, 420);
/// Weight of a step in the smoothed loss.
const SMOOTHING: f64 = 0.1;

/// An SVG of training loss, smoothed, and of evaluation loss, against what all links have sent so far. Nothing if there
/// is nothing to draw.
///
/// # Errors
/// What the drawing library says.
pub(crate) fn loss_against_bytes(metrics: &[StepMetrics]) -> Result<Option<String>, String> {
    let mut sent = 0.0;
    let mut smooth: Option<f64> = None;
    let (mut training, mut evaluation) = (Vec::new(), Vec::new());
    for step in metrics.iter().filter(|m| m.loss.is_finite()) {
        sent += step.links.iter().map(|l| l.bytes as f64).sum::<f64>() / 1e6;
        let loss = smooth.map_or(step.loss, |s| s + SMOOTHING * (step.loss - s));
        smooth = Some(loss);
        training.push((sent, loss));
        evaluation.extend(step.eval_loss.map(|loss| (sent, loss)));
    }
    if training.len() < 2 || sent == 0.0 {
        return Ok(None);
    }
    let losses = || training.iter().chain(&evaluation).map(|(_, loss)| *loss);
    let (low, high) = (losses().fold(f64::INFINITY, f64::min), losses().fold(f64::NEG_INFINITY, f64::max));
    let margin = (high - low).max(1e-6) * 0.05;
    let mut svg = String::new();
    draw(&mut svg, (0.0..sent, low - margin..high + margin), training, evaluation).map_err(|e| e.to_string())?;
    Ok(Some(svg))
}

type Ranges = (std::ops::Range<f64>, std::ops::Range<f64>);
type Points = Vec<(f64, f64)>;

fn draw(
    svg: &mut String,
    (x, y): Ranges,
    training: Points,
    evaluation: Points,
) -> Result<(), Box<dyn std::error::Error>> {
    let root = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .caption("loss against bytes sent", ("sans-serif", 18))
        .margin(14)
        .x_label_area_size(40)
        .y_label_area_size(52)
        .build_cartesian_2d(x, y)?;
    chart
        .configure_mesh()
        .x_desc("MB sent over all links")
        .y_desc("loss, nats per token")
        .light_line_style(WHITE)
        .bold_line_style(RGBColor(225, 228, 232))
        .draw()?;
    let (blue, orange) = (RGBColor(59, 125, 216), RGBColor(224, 138, 46));
    let swatch = |color: RGBColor| move |(x, y)| PathElement::new(vec![(x, y), (x + 18, y)], color.stroke_width(2));
    chart
        .draw_series(LineSeries::new(training, blue.stroke_width(2)))?
        .label("training (smoothed)")
        .legend(swatch(blue));
    if !evaluation.is_empty() {
        let marks = evaluation.iter().map(|&point| Circle::new(point, 3, orange.filled()));
        chart.draw_series(marks)?;
        chart
            .draw_series(LineSeries::new(evaluation, orange.stroke_width(2)))?
            .label("evaluation")
            .legend(swatch(orange));
    }
    chart.configure_series_labels().background_style(WHITE).border_style(RGBColor(200, 204, 210)).draw()?;
    root.present()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    #[test]
    fn a_run_is_drawn_and_one_without_links_is_not() {
        let metrics: Vec<StepMetrics> = (1..=6).map(|step| testing::metrics(step, 4.0 - step as f64 / 2.0)).collect();
        let svg = loss_against_bytes(&metrics).unwrap().unwrap();
        assert!(svg.starts_with("<svg") && svg.contains("polyline") && svg.contains("circle"), "{svg}");
        let mut silent = metrics.clone();
        silent.iter_mut().for_each(|m| m.links.clear());
        assert_eq!(loss_against_bytes(&silent).unwrap(), None);
        assert_eq!(loss_against_bytes(&metrics[..1]).unwrap(), None);
    }
}
