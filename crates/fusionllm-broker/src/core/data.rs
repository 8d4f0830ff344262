//! What the data owner found, held against what the job was trained on before.

use fusionllm_protocol::{DataReport, JobEvent, RunKey, content_hash};

use super::{Action, Core};

impl Core {
    /// The data owner has read its data: what follows, or why the job cannot go on.
    pub(super) fn data_read(&mut self, key: RunKey, data: DataReport) -> Result<Vec<Action>, String> {
        let Some(job) = self.jobs.get_mut(&key.job) else { return Ok(Vec::new()) };
        let mut notes = data.notes.clone();
        if let (Some(run), Some(now)) = (job.run.as_mut(), &data.fingerprint) {
            let from_step = run.from();
            if let Some(before) = run.origin.data.as_ref().or(job.record.data.as_ref()) {
                match now.tokenizer_change(before) {
                    Some(reason) if from_step > 0 => return Err(reason),
                    // Nothing was learnt by the other one.
                    Some(_) => notes.push(format!(
                        "data.tokenizer is {} now, it was {} when the job began before",
                        now.tokenizer.name, before.tokenizer.name
                    )),
                    None => {}
                }
                notes.extend(now.changes_since(before));
            }
            job.record.data = Some(now.clone());
            let is_other = |source: &str| content_hash(source.as_bytes()) != now.tokenizer.hash;
            if run.origin.tokenizer().is_some_and(is_other) {
                run.origin.set_tokenizer(None);
                notes.push(format!(
                    "the tokenizer {} on the data owner's machine is not the file that was there when the job was handed \
                     in: checkpoints go without it, and export and generate need --tokenizer FILE",
                    now.tokenizer.name
                ));
            }
            run.origin.data = Some(now.clone());
        }
        let mut actions = vec![Action::WriteData { key, data: data.clone() }];
        actions.push(Action::Emit(JobEvent::Data { job: key.job, data }));
        actions.extend(self.notices(key.job, notes));
        Ok(actions)
    }
}
