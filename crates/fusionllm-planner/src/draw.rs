//! A plan as a drawing (SVG): who holds what, and the timeline of the simulated step.

use std::fmt::Write;

use fusionllm_graph::OpDag;

use crate::{NodeIndex, Plan, Task, format_bytes, format_seconds};

/// Widths and heights in pixels.
const LABEL_WIDTH: f64 = 390.0;
const TIME_WIDTH: f64 = 900.0;
const HEADER: f64 = 74.0;
const ROW: f64 = 44.0;
const BAR: f64 = 20.0;
const WIRE: f64 = 6.0;
const FOOTER: f64 = 34.0;
const MARGIN: f64 = 24.0;
const TICKS: usize = 6;

const FP: &str = "#3b7dd8";
const BP: &str = "#2f9e6e";
const WG: &str = "#8cc9ac";
const UPDATE: &str = "#8a8f98";
const SEND: &str = "#e08a2e";

impl Plan {
    /// The drawing: a row a CompNode with its ops, memory and share of busy time; on the right what it computes when,
    /// and below that what it sends.
    pub fn svg(&self, dag: &OpDag) -> String {
        let rows = self.placement.compnodes.len();
        let (width, height) = (LABEL_WIDTH + TIME_WIDTH + 3.0 * MARGIN, HEADER + ROW * rows as f64 + FOOTER);
        let mut svg = format!(
            "<svg data-made-by=\"fusionllm plan\" xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" \
             height=\"{height}\" font-family=\"sans-serif\" font-size=\"12\" fill=\"#222\">\n\
             <rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n"
        );
        let step_s = self.prediction.step_s;
        let title = format!("{} on {rows} CompNodes: {} a step", dag.name(), format_seconds(step_s));
        text(&mut svg, MARGIN, 24.0, "font-size=\"16\" font-weight=\"bold\"", &title);
        let waits = self.prediction.critical_path.first().map_or("", String::as_str);
        text(&mut svg, MARGIN, 44.0, "fill=\"#666\"", waits);
        legend(&mut svg);
        for index in 0..rows {
            let y = HEADER + ROW * index as f64;
            if index % 2 == 0 {
                rect(&mut svg, (0.0, y, width, ROW), "#f5f6f8", "");
            }
            self.label(&mut svg, dag, index, y);
        }
        let x = |at_s: f64| MARGIN + LABEL_WIDTH + at_s / step_s * TIME_WIDTH;
        for tick in 0..=TICKS {
            let at_s = step_s * tick as f64 / TICKS as f64;
            let bottom = height - FOOTER;
            let _ = writeln!(
                svg,
                "<line x1=\"{0:.1}\" y1=\"{HEADER}\" x2=\"{0:.1}\" y2=\"{bottom:.1}\" stroke=\"#d5d8dd\"/>",
                x(at_s)
            );
            text(&mut svg, x(at_s), bottom + 18.0, "text-anchor=\"middle\" fill=\"#666\"", &format_seconds(at_s));
        }
        for span in &self.simulated.spans {
            let (color, what) = match span.task {
                Task::Fp { stage, micro_batch } => (FP, format!("FP, stage {}, micro-batch {micro_batch}", stage.0)),
                Task::Bp { stage, micro_batch } => (BP, format!("BP, stage {}, micro-batch {micro_batch}", stage.0)),
                Task::Wg { stage, micro_batch } => {
                    (WG, format!("weight gradients, stage {}, micro-batch {micro_batch}", stage.0))
                }
                Task::Update => (UPDATE, "UPDATE".to_owned()),
            };
            let y = HEADER + ROW * span.node.index() as f64 + 6.0;
            rect(&mut svg, (x(span.start_s), y, x(span.end_s) - x(span.start_s), BAR), color, &what);
        }
        for transfer in &self.simulated.transfers {
            let y = HEADER + ROW * transfer.from.index() as f64 + 6.0 + BAR + 4.0;
            let to = self.placement.compnodes.get(transfer.to.index()).map_or("?", String::as_str);
            let what = format!("{} to {to}", format_bytes(transfer.bytes));
            rect(&mut svg, (x(transfer.start_s), y, x(transfer.sent_s) - x(transfer.start_s), WIRE), SEND, &what);
        }
        svg.push_str("</svg>\n");
        svg
    }

    fn label(&self, svg: &mut String, dag: &OpDag, index: usize, y: f64) {
        let Some(node) = self.prediction.compnodes.get(index) else { return };
        text(svg, MARGIN, y + 18.0, "font-weight=\"bold\"", &node.name);
        let right = MARGIN + LABEL_WIDTH - 12.0;
        let busy = format!("{}, busy {:.0} %", node.memory(), node.busy * 100.0);
        text(svg, right, y + 18.0, "text-anchor=\"end\" fill=\"#666\" font-size=\"11\"", &busy);
        text(
            svg,
            MARGIN,
            y + 34.0,
            "fill=\"#666\" font-size=\"11\"",
            &self.placement.pieces(dag, NodeIndex(index as u32)),
        );
    }
}

fn legend(svg: &mut String) {
    let entries = [("FP", FP), ("BP", BP), ("WG", WG), ("UPDATE", UPDATE), ("sends", SEND)];
    for (index, (name, color)) in entries.into_iter().enumerate() {
        let x = MARGIN + LABEL_WIDTH + index as f64 * 84.0;
        rect(svg, (x, 54.0, 12.0, 12.0), color, "");
        text(svg, x + 17.0, 64.0, "", name);
    }
}

fn rect(svg: &mut String, (x, y, width, height): (f64, f64, f64, f64), color: &str, title: &str) {
    let title = if title.is_empty() { String::new() } else { format!("<title>{}</title>", escape(title)) };
    // Narrower than this nothing is seen.
    let width = width.max(0.3);
    let _ = writeln!(
        svg,
        "<rect x=\"{x:.2}\" y=\"{y:.1}\" width=\"{width:.2}\" height=\"{height}\" fill=\"{color}\">{title}</rect>"
    );
}

fn text(svg: &mut String, x: f64, y: f64, style: &str, content: &str) {
    let _ = writeln!(svg, "<text x=\"{x:.1}\" y=\"{y:.1}\" {style}>{}</text>", escape(content));
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use crate::testing::small_gpt2;
    use crate::{Cluster, Pipeline, PlacementSpec, PlanSpec, Strategy, plan};

    #[test]
    fn the_drawing_has_a_bar_for_every_task_and_message_and_escapes_names() {
        let dag = small_gpt2(2);
        let mut cluster = Cluster::uniform(2);
        cluster.compnodes[1].name = "a<b>&c".to_owned();
        let spec = PlanSpec::dense(PlacementSpec {
            strategy: Strategy::EqualCompute,
            stages: Vec::new(),
            pipeline: Pipeline::OneFOneB,
            run_ahead: None,
            deferred: None,
            micro_batches: 3,
            micro_batch_size: 1,
            eval_micro_batches: 1,
            private: false,
            keep_blocks: [0; 2],
            codec: fusionllm_codec::Codec::Dense,
        });
        let plan = plan(&dag, &cluster, &spec).unwrap();
        let svg = plan.svg(&dag);
        assert!(svg.contains("a&lt;b&gt;&amp;c") && !svg.contains("a<b>"));
        let titles = svg.matches("<title>").count();
        assert_eq!(titles, plan.simulated.spans.len() + plan.simulated.transfers.len());
        assert!(svg.ends_with("</svg>\n"));
    }
}
