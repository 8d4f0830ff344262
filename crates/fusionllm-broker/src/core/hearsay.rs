//! What those that train with a silent CompNode hear of it.

use std::time::Duration;

use super::ConnectionId;

/// Peers that have heard nothing for so long agree.
const UNHEARD: Duration = Duration::from_secs(3);
/// Peers are asked again so often.
const ASK_EACH: Duration = Duration::from_secs(1);
/// Of one CompNode, during one silence.
#[derive(Debug, Default)]
pub(super) struct Hearsay {
    asked: Option<Duration>,
    /// By who says so: when that one last heard of it.
    heard: Vec<(ConnectionId, Duration)>,
}

impl Hearsay {
    /// Somebody has heard of it at that time.
    pub(super) fn says(&mut self, witness: ConnectionId, at: Duration) {
        self.heard.retain(|(other, _)| *other != witness);
        self.heard.push((witness, at));
    }

    /// Whether it is time to ask.
    pub(super) fn asks(&mut self, now: Duration) -> bool {
        let is_due = self.asked.is_none_or(|asked| now.saturating_sub(asked) >= ASK_EACH);
        if is_due {
            self.asked = Some(now);
        }
        is_due
    }

    /// Whether somebody has been asked in this silence, and nobody has heard of it for a while.
    pub(super) fn agrees(&self, now: Duration) -> bool {
        !self.heard.is_empty() && self.heard.iter().all(|(_, at)| now.saturating_sub(*at) >= UNHEARD)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_who_were_asked_must_agree() {
        let second = Duration::from_secs;
        let mut hearsay = Hearsay::default();
        assert!(!hearsay.agrees(second(9)), "nobody was asked");
        hearsay.says(ConnectionId(1), second(2));
        assert!(hearsay.agrees(second(5)) && !hearsay.agrees(second(4)));
        hearsay.says(ConnectionId(2), second(4));
        assert!(!hearsay.agrees(second(5)));
        hearsay.says(ConnectionId(2), second(2));
        assert!(hearsay.agrees(second(5)));
        assert!(hearsay.asks(second(5)) && !hearsay.asks(second(5)) && hearsay.asks(second(6)));
    }
}
