//! What those that train with a silent CompNode hear of it.

use std::time::Duration;

use super::ConnectionId;

/// Peers that have heard nothing for so long agree.
const UNHEARD: Duration = Duration::from_secs(3);
/// Peers are asked again so often.
const ASK_EACH: Duration = Duration::from_secs(1);
/// An answer counts for so long: a little longer than it takes to ask again.
const FRESH: Duration = Duration::from_millis(2500);

/// Of one CompNode, during one silence.
#[derive(Debug, Default)]
pub(super) struct Hearsay {
    asked: Option<Duration>,
    /// By who says so: when that one last heard of it, and when it said so.
    heard: Vec<(ConnectionId, Duration, Duration)>,
}

impl Hearsay {
    /// Somebody has heard of it at that time.
    pub(super) fn says(&mut self, witness: ConnectionId, at: Duration, now: Duration) {
        self.heard.retain(|(other, ..)| *other != witness);
        self.heard.push((witness, at, now));
    }

    /// Whether it is time to ask.
    pub(super) fn asks(&mut self, now: Duration) -> bool {
        let is_due = self.asked.is_none_or(|asked| now.saturating_sub(asked) >= ASK_EACH);
        if is_due {
            self.asked = Some(now);
        }
        is_due
    }

    /// Whether somebody says now, in this silence, that nothing was heard for a while, and nobody says otherwise. Who does
    /// not answer any more says nothing.
    pub(super) fn agrees(&self, now: Duration) -> bool {
        let mut fresh = self.heard.iter().filter(|(_, _, said)| now.saturating_sub(*said) <= FRESH).peekable();
        fresh.peek().is_some() && fresh.all(|(_, at, _)| now.saturating_sub(*at) >= UNHEARD)
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
        hearsay.says(ConnectionId(1), second(2), second(4));
        assert!(hearsay.agrees(second(5)) && !hearsay.agrees(second(4)));
        hearsay.says(ConnectionId(2), second(4), second(5));
        assert!(!hearsay.agrees(second(5)));
        hearsay.says(ConnectionId(2), second(2), second(5));
        assert!(hearsay.agrees(second(5)));
        assert!(!hearsay.agrees(second(8)), "nobody answers any more: the broker may be cut off");
        assert!(hearsay.asks(second(5)) && !hearsay.asks(second(5)) && hearsay.asks(second(6)));
    }
}
