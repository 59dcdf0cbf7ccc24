//! Completion scripts for shells, generated from the description that parses the arguments.

use crate::args::{Cli, Shell};
use crate::failure::{Exit, Failure};
use crate::stdout;
use clap::CommandFactory as _;
use clap_complete::aot::{Bash, Fish, Zsh, generate};

pub(crate) fn run(shell: Shell) -> Result<Exit, Failure> {
    stdout::print(&script(shell))?;
    Ok(Exit::Good)
}

fn script(shell: Shell) -> String {
    let mut command = Cli::command();
    // In memory, because clap_complete panics on a closed pipe.
    let mut bytes = Vec::new();
    match shell {
        Shell::Bash => generate(Bash, &mut command, "cvm", &mut bytes),
        Shell::Zsh => generate(Zsh, &mut command, "cvm", &mut bytes),
        Shell::Fish => generate(Fish, &mut command, "cvm", &mut bytes),
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_shell_completes_every_command() {
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            let script = script(shell);
            for command in Cli::command().get_subcommands().filter(|c| !c.is_hide_set()) {
                assert!(script.contains(command.get_name()), "{shell:?} lacks {}", command.get_name());
            }
        }
    }
}
