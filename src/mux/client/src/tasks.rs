//! Tasks that run for as long as the program does.

use std::collections::HashMap;
use tokio::task::{Id, JoinSet};

#[derive(Default)]
pub(crate) struct Tasks {
    all: JoinSet<()>,
    names: HashMap<Id, &'static str>,
}

impl Tasks {
    pub(crate) fn spawn(&mut self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        let id = self.all.spawn(task).id();
        self.names.insert(id, name);
    }

    /// Waits for the end of one task, by itself or by a panic, and returns its name.
    pub(crate) async fn ended(&mut self) -> &'static str {
        let id = match self.all.join_next_with_id().await {
            Some(Ok((id, ()))) => Some(id),
            Some(Err(error)) => Some(error.id()),
            None => None,
        };
        id.and_then(|id| self.names.get(&id)).copied().unwrap_or("a task")
    }

    pub(crate) async fn shutdown(mut self) {
        self.all.shutdown().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_task_that_ends_or_panics_is_named() {
        tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
            let mut tasks = Tasks::default();
            tasks.spawn("one that stays", std::future::pending());
            tasks.spawn("one that ends", std::future::ready(()));
            assert_eq!(tasks.ended().await, "one that ends");
            tasks.spawn("one that panics", async { panic!("a bug") });
            assert_eq!(tasks.ended().await, "one that panics");
        });
    }
}
