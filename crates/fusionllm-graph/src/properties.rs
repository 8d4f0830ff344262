//! Properties that hold for any OP-DAG, on random chains and branches.

use proptest::prelude::*;
use serde_json::Value;

use crate::{
    ActivationFunction, DType, DagBuilder, GraphError, Init, OpDag, OpId, OpKind, Param, ParamId, RotaryScaling, Shape,
    WeightLayout,
};

const SEQ_LEN: usize = 3;
const DIM: usize = 4;
const VOCAB: usize = 7;

/// One step of a random model: which op, on which of the tensors so far, with which attributes.
type Pick = (u8, prop::sample::Index, prop::sample::Index, u8);

struct Grower {
    dag: DagBuilder,
    /// Ops with an output of `[B, S, D]`, and whether something reads them.
    pool: Vec<(OpId, bool)>,
    count: usize,
}

impl Grower {
    fn add(&mut self, kind: OpKind, inputs: &[OpId]) -> OpId {
        self.count += 1;
        let name = format!("op{}", self.count);
        let params: Vec<ParamId> = kind
            .param_roles()
            .into_iter()
            .map(|role| {
                let init = Init::Normal { std: 1.0 / self.count as f32 };
                let name = format!("{name}.{}", role.name);
                self.dag.param(Param { name, shape: role.shape, init, decay: true, frozen: role.running }).unwrap()
            })
            .collect();
        for (op, read) in &mut self.pool {
            *read |= inputs.contains(op);
        }
        self.dag.op(&name, kind, inputs, &params).unwrap()
    }

    fn grow(&mut self, (what, first, second, attribute): Pick) {
        let (a, b) = (first.get(&self.pool).0, second.get(&self.pool).0);
        let layout = if attribute % 2 == 0 { WeightLayout::InOut } else { WeightLayout::OutIn };
        let linear = |outputs| OpKind::Linear { inputs: DIM, outputs, bias: attribute > 99, layout };
        let functions = [
            ActivationFunction::GeluTanh,
            ActivationFunction::GeluErf,
            ActivationFunction::Relu,
            ActivationFunction::Silu,
        ];
        let grown = match what % 12 {
            0 => self.add(linear(DIM), &[a]),
            1 => self.add(OpKind::LayerNorm { dim: DIM, eps: f64::from(attribute) / 3.0 + 1e-5 }, &[a]),
            2 => self.add(OpKind::Activation { function: functions[usize::from(attribute) % 4] }, &[a]),
            3 => self.add(OpKind::Add, &[a, b]),
            4 => self.add(OpKind::Mul, &[a, b]),
            5 => self.add(OpKind::Dropout { p: f64::from(attribute) / 256.0 }, &[a]),
            7 => self.add(OpKind::RmsNorm { dim: DIM / 2, eps: f64::from(attribute) / 3.0 + 1e-5 }, &[a]),
            8 => {
                let scaling = if attribute % 2 == 0 {
                    RotaryScaling::None
                } else {
                    RotaryScaling::Linear { factor: f64::from(attribute) }
                };
                self.add(OpKind::Rotary { head_dim: DIM / 2, base: 1e4 + f64::from(attribute), scaling }, &[a])
            }
            9 => {
                let (key, value) = (self.add(linear(DIM / 2), &[a]), self.add(linear(DIM / 2), &[b]));
                self.add(OpKind::GroupedAttention { heads: 2, kv_heads: 1, causal: attribute > 99 }, &[a, key, value])
            }
            6 => self.add(OpKind::Position { positions: SEQ_LEN + usize::from(attribute), dim: DIM }, &[a]),
            10 => self.add(OpKind::Scale { factor: f64::from(attribute) + 0.5 }, &[a]),
            _ => {
                let packed = self.add(linear(3 * DIM), &[a]);
                self.add(OpKind::Attention { heads: 2, causal: attribute > 99 }, &[packed])
            }
        };
        self.pool.push((grown, false));
    }
}

fn grown(picks: Vec<Pick>) -> OpDag {
    let mut grower = Grower { dag: DagBuilder::new("grown"), pool: Vec::new(), count: 0 };
    let ids = Shape::batched(&[SEQ_LEN]);
    let input = grower.add(OpKind::Input { dtype: DType::I32, shape: ids.clone() }, &[]);
    let rows = grower.add(OpKind::Embedding { vocab: VOCAB, dim: DIM }, &[input]);
    grower.pool.push((rows, false));
    for pick in picks {
        grower.grow(pick);
    }
    let unread: Vec<OpId> = grower.pool.iter().filter(|(_, read)| !read).map(|&(op, _)| op).collect();
    let end = unread.into_iter().reduce(|sum, op| grower.add(OpKind::Add, &[sum, op])).unwrap();
    let head = OpKind::Linear { inputs: DIM, outputs: VOCAB, bias: false, layout: WeightLayout::OutIn };
    let logits = grower.add(head, &[end]);
    let label = grower.add(OpKind::Label { shape: ids }, &[]);
    grower.add(OpKind::CrossEntropy, &[logits, label]);
    grower.dag.build().unwrap()
}

fn dags() -> impl Strategy<Value = OpDag> {
    prop::collection::vec(any::<Pick>(), 0..24).prop_map(grown)
}

fn is_topological(dag: &OpDag) -> bool {
    dag.op_ids().all(|op| dag.op(op).inputs.iter().all(|&input| input < op))
}

/// The list under `key` of a JSON form.
fn list<'a>(form: &'a mut Value, key: &str) -> &'a mut Vec<Value> {
    form[key].as_array_mut().unwrap()
}

fn form_of(dag: &OpDag) -> Value {
    serde_json::from_str(&dag.to_json()).unwrap()
}

proptest! {
    #[test]
    fn json_round_trips(dag in dags()) {
        let text = dag.to_json();
        let read = OpDag::from_json(&text).unwrap();
        prop_assert_eq!(read.to_json(), text);
        prop_assert_eq!(read, dag);
    }

    #[test]
    fn any_order_of_the_ops_is_read_as_a_topological_one(
        (dag, order) in dags().prop_flat_map(|dag| {
            let places: Vec<usize> = (0..dag.ops().len()).collect();
            (Just(dag), Just(places).prop_shuffle())
        }),
    ) {
        let mut form = form_of(&dag);
        let ops = list(&mut form, "ops").clone();
        *list(&mut form, "ops") = order.into_iter().map(|place| ops[place].clone()).collect();
        let read = OpDag::from_json(&form.to_string()).unwrap();
        prop_assert!(is_topological(&dag) && is_topological(&read));
        prop_assert_eq!(read.total_cost(2), dag.total_cost(2));
        for op in dag.op_ids() {
            let found = read.op(read.find(&dag.op(op).name).unwrap());
            prop_assert_eq!(&found.kind, &dag.op(op).kind);
            prop_assert_eq!(&found.output, &dag.op(op).output);
        }
    }

    #[test]
    fn consumers_and_inputs_are_the_same_edges(dag in dags()) {
        for op in dag.op_ids() {
            let readers: Vec<OpId> = dag.op_ids().filter(|&other| dag.op(other).inputs.contains(&op)).collect();
            prop_assert_eq!(dag.consumers(op), readers);
        }
    }

    #[test]
    fn a_parameter_with_a_changed_dimension_is_refused_by_the_op_that_uses_it(
        dag in dags(),
        param in any::<prop::sample::Index>(),
        dim in any::<prop::sample::Index>(),
    ) {
        let param = ParamId(param.index(dag.params().len()) as u32);
        let dim = dim.index(dag.param(param).shape.len());
        let mut form = form_of(&dag);
        list(&mut list(&mut form, "params")[param.index()], "shape")[dim] = Value::from(dag.param(param).shape[dim] + 1);
        let user = &dag.op(dag.users_of(param)[0]).name;
        match OpDag::from_json(&form.to_string()) {
            Err(GraphError::Misfit { op, .. }) => prop_assert_eq!(&op, user),
            other => prop_assert!(false, "{:?}", other),
        }
    }

    #[test]
    fn an_input_with_a_changed_dimension_is_refused(dag in dags()) {
        let mut form = form_of(&dag);
        // The label keeps the old length, so at the latest the loss objects.
        let input = dag.input().unwrap().index();
        list(&mut list(&mut form, "ops")[input]["kind"], "shape")[1] = Value::from(SEQ_LEN + 1);
        let read = OpDag::from_json(&form.to_string());
        prop_assert!(matches!(read, Err(GraphError::Misfit { .. })), "{:?}", read);
    }

    #[test]
    fn damaged_text_is_refused_or_read_but_never_panics(
        dag in dags(),
        at in any::<prop::sample::Index>(),
        byte in 0x20_u8..0x7f,
    ) {
        let mut text = dag.to_json().into_bytes();
        let at = at.index(text.len());
        text[at] = byte;
        let _ = OpDag::from_json(&String::from_utf8(text).unwrap());
    }
}
