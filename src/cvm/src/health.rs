//! `cvm health`: one line and an exit code, for HEALTHCHECK.
//!
//! Docker knows 0 and 1 only, and reserves 2: everything that is not healthy is 1 here, a
//! supervisor that does not answer included.
//!
//! May import: `args`, `out`, `socket`, `trouble`, `words`.

use crate::args::HealthArgs;
use crate::out;
use crate::socket;
use crate::trouble::{Exit, Trouble};
use crate::words::clean;
use cvm_blueprint::status::Status;
use std::fmt::Write as _;

pub(crate) fn run(args: &HealthArgs) -> Result<Exit, Trouble> {
    let status = match socket::status() {
        Ok(snapshot) => snapshot.status,
        Err(trouble) => return Err(trouble.with_exit(Exit::Bad)),
    };
    out::print(&render(&status, args.verbose))?;
    Ok(if status.healthy { Exit::Good } else { Exit::Bad })
}

fn render(status: &Status, verbose: bool) -> String {
    let complaints: Vec<String> = status.unhealthy.iter().map(|c| clean(c)).collect();
    let mut text = if status.healthy {
        "healthy\n".to_owned()
    } else if verbose {
        format!("not healthy\n  {}\n", complaints.join("\n  "))
    } else {
        format!("not healthy: {}\n", complaints.join("; "))
    };
    if verbose {
        for service in &status.services {
            let _ = writeln!(text, "  {}: {}", clean(&service.name), clean(&service.state)); // a String takes all
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::samples;

    #[test]
    fn one_line_says_it_all() {
        assert_eq!(render(&samples::healthy(), false), "healthy\n");
        let text = render(&samples::troubled(), false);
        assert_eq!(text.lines().count(), 1);
        assert!(text.starts_with("not healthy: boot step storage: "), "{text}");
    }

    #[test]
    fn verbose_adds_every_service() {
        let text = render(&samples::healthy(), true);
        assert_eq!(text, "healthy\n  sshd: up\n  dockerd: ready\n  gateway: ready\n");
    }
}
