//! What CompNodes do while they wait: weight gradients that BP has put off.

use super::{Cause, Span, State, Work};
use crate::{Deferrable, NodeIndex, Task};

impl State<'_> {
    /// WG tasks that are done before their place in the order need nothing there.
    pub(super) fn pass_over_done(&mut self, node: usize) {
        let order = &self.placement.train.orders[node];
        while let Some(task @ Task::Wg { .. }) = order.get(self.next[node])
            && self.deferred[node].front().is_none_or(|(first, _)| first != task)
        {
            self.next[node] += 1;
        }
    }

    /// Begins one product of a WG task.
    pub(super) fn make_up(&mut self, node: usize, task: Task, now_s: f64) {
        let (Task::Wg { stage, .. }, cause) = (task, self.free[node].cause) else { return };
        let span = match cause {
            Cause::Span(last) if self.spans[last].task == task => last,
            _ => {
                self.spans.push(Span { node: NodeIndex(node as u32), task, start_s: now_s, end_s: now_s, cause });
                self.spans.len() - 1
            }
        };
        self.at_work[node] = Work::Busy(span);
        let Deferrable { seconds, products, .. } = self.costs.deferrable[stage.index()];
        self.hosts.begin(node, seconds / f64::from(products.max(1)), now_s, &mut self.agenda);
    }

    /// One product of the oldest WG task is done.
    pub(super) fn made_up(&mut self, node: usize) {
        if let Some((_, left)) = self.deferred[node].front_mut() {
            *left -= 1;
        }
        self.deferred[node].pop_front_if(|(_, left)| *left == 0);
    }

    /// After BP its weight gradients wait.
    pub(super) fn put_off(&mut self, node: usize, task: Task) {
        if let (Task::Bp { stage, micro_batch }, true) = (task, self.defers[node]) {
            let products = self.costs.deferrable[stage.index()].products;
            if products > 0 {
                self.deferred[node].push_back((Task::Wg { stage, micro_batch }, products));
            }
        }
    }
}
