//! How long each step on the way to a tree took: said once it is there, for whoever wonders why a
//! start is slow. May import: `owner`, for its clock.

use crate::owner::uptime;
use std::time::Duration;

#[derive(Debug)]
pub(crate) struct Steps {
    began: Duration,
    last: Duration,
    done: Vec<(&'static str, Duration)>,
}

impl Default for Steps {
    fn default() -> Self {
        let now = uptime();
        Self { began: now, last: now, done: Vec::new() }
    }
}

impl Steps {
    /// What was done since the last one.
    pub(crate) fn did(&mut self, what: &'static str) {
        self.did_until(what, uptime());
    }

    fn did_until(&mut self, what: &'static str, now: Duration) {
        self.done.push((what, now.saturating_sub(self.last)));
        self.last = now;
    }

    /// All of them in one line.
    pub(crate) fn words(&self) -> String {
        let seconds = |time: Duration| format!("{:.2}", time.as_secs_f64());
        let steps: Vec<String> =
            self.done.iter().map(|(what, took)| format!("{what} {}", seconds(*took))).collect();
        format!("{} s ({})", seconds(self.last.saturating_sub(self.began)), steps.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_steps_and_their_sum_are_said() {
        let at = Duration::from_millis;
        let mut steps = Steps { began: at(100), last: at(100), done: Vec::new() };
        steps.did_until("bucket", at(150));
        steps.did_until("manifest", at(1400));
        assert_eq!(steps.words(), "1.30 s (bucket 0.05, manifest 1.25)");
    }
}
