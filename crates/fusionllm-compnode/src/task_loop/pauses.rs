//! What the task loop does while it waits: weight gradients that BP has put off.

use std::time::Instant;

use fusionllm_planner::{StageId, Task};

use super::TaskLoop;
use crate::CompNodeError;
use crate::mailbox::{Arrived, Slot};

impl TaskLoop {
    /// Waits for a message, and meanwhile makes weight gradients that BP has put off.
    pub(super) fn receive(&mut self, slot: Slot) -> Result<Arrived, CompNodeError> {
        while let Some((stage, micro_batch)) = self.executor.owes() {
            if let Some(arrived) = self.exchange.receive_now(slot)? {
                return Ok(arrived);
            }
            self.make_up(Task::Wg { stage, micro_batch })?;
        }
        Ok(self.exchange.receive(slot)?)
    }

    /// Makes the weight gradients that this BP has put off, if they are not there yet.
    pub(super) fn make_up_for(&mut self, stage: StageId, micro_batch: u32) -> Result<(), CompNodeError> {
        while self.executor.owes() == Some((stage, micro_batch)) {
            self.make_up(Task::Wg { stage, micro_batch })?;
        }
        Ok(())
    }

    fn make_up(&mut self, task: Task) -> Result<(), CompNodeError> {
        self.exchange.check()?;
        let began = Instant::now();
        self.executor.make_up()?;
        self.worked(task, began);
        Ok(())
    }
}
