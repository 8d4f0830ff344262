//! The run's plot: loss against bytes sent.

use fusionllm_protocol::StepMetrics;
use plotters::prelude::*;

use crate::metrics::Thinned;

/// Size in pixels.
const SIZE: (u32, u32) = (760, 420);
/// Weight of a step in the smoothed loss.
const SMOOTHING: f64 = 0.1;

/// Points of a curve: more cannot be told apart.
const POINTS: usize = 4096;

/// Training loss, smoothed, and evaluation loss, against what all links have sent so far.
#[derive(Clone, Debug)]
pub(crate) struct LossPlot {
    /// Megabytes sent so far.
    sent: f64,
    smooth: Option<f64>,
    training: Thinned<(f64, f64)>,
    evaluation: Thinned<(f64, f64)>,
}

impl Default for LossPlot {
    fn default() -> Self {
        Self { sent: 0.0, smooth: None, training: Thinned::new(POINTS), evaluation: Thinned::new(POINTS) }
    }
}

impl LossPlot {
    /// Takes the next step in.
    pub(crate) fn add(&mut self, step: &StepMetrics) {
        if !step.loss.is_finite() {
            return;
        }
        self.sent += step.links.iter().map(|l| l.bytes as f64).sum::<f64>() / 1e6;
        let loss = self.smooth.map_or(step.loss, |s| s + SMOOTHING * (step.loss - s));
        self.smooth = Some(loss);
        self.training.push((self.sent, loss));
        if let Some(loss) = step.eval_loss {
            self.evaluation.push((self.sent, loss));
        }
    }

    /// As an SVG. Nothing if there is nothing to draw.
    ///
    /// # Errors
    /// What the drawing library says.
    pub(crate) fn svg(&self) -> Result<Option<String>, String> {
        let (training, evaluation) = (self.training.values().to_vec(), self.evaluation.values().to_vec());
        if training.len() < 2 || self.sent == 0.0 {
            return Ok(None);
        }
        let losses = || training.iter().chain(&evaluation).map(|(_, loss)| *loss);
        let (low, high) = (losses().fold(f64::INFINITY, f64::min), losses().fold(f64::NEG_INFINITY, f64::max));
        let margin = (high - low).max(1e-6) * 0.05;
        let mut svg = String::new();
        draw(&mut svg, (0.0..self.sent, low - margin..high + margin), training, evaluation)
            .map_err(|e| e.to_string())?;
        Ok(Some(svg))
    }
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

    fn svg(metrics: &[StepMetrics]) -> Option<String> {
        let mut plot = LossPlot::default();
        metrics.iter().for_each(|m| plot.add(m));
        plot.svg().unwrap()
    }

    #[test]
    fn a_run_is_drawn_and_one_without_links_is_not() {
        let metrics: Vec<StepMetrics> = (1..=6).map(|step| testing::metrics(step, 4.0 - step as f64 / 2.0)).collect();
        let drawn = svg(&metrics).unwrap();
        assert!(drawn.starts_with("<svg") && drawn.contains("polyline") && drawn.contains("circle"), "{drawn}");
        let mut silent = metrics.clone();
        silent.iter_mut().for_each(|m| m.links.clear());
        assert_eq!(svg(&silent), None);
        assert_eq!(svg(&metrics[..1]), None);
    }
}
