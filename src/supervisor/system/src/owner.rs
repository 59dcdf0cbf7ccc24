//! Checks whether the owner of the compose file has written this environment.
//!
//! On dstack everybody can encrypt an environment for a machine, and environments are not signed. But the compose
//! file is measured. So a word in that file, `CVM_OWNER`, is the hash of a secret that only the owner has: the
//! `MASTER_KEY` or a token. The environment has to hold that secret. It is checked before anything starts, sshd
//! included.
//!
//! A refusal does not tell how close a wrong word is.

use crate::config::Config;
use crate::env::Problem;
use cvm_protocol::doors::Door;
use cvm_secrets::keys;
use cvm_secrets::owner::Epoch;
use cvm_secrets::secret::Secret;

/// The proof that the owner has written the environment, which nobody else can give.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Proof {
    pub epoch: Epoch,
}

/// Proves by `CVM_OWNER` that the owner has written this environment; none if it is not set.
pub fn prove(config: &Config) -> Result<Option<Proof>, Problem> {
    let Some(owner) = &config.owner else { return Ok(None) };
    let (own, rule, hint) = match (&owner.token, &config.master_key) {
        (Some(token), _) => (
            Some(keys::owner_word_of_token(token)),
            "is not the SHA-256 of this CVM_OWNER_TOKEN: this environment was not written by the owner of the compose file, or one of the two is mistyped; nothing was opened",
            "correct the token, or write the other hash into the compose file with `image/pin --owner`, and deploy again",
        ),
        (None, master) => (
            master.as_ref().map(|master| keys::owner_word(master, owner.epoch)),
            "does not belong to this MASTER_KEY and CVM_OWNER_EPOCH: this environment was not written by the owner of the compose file, or one of the three is mistyped; nothing was opened",
            "compare with `cvm derive owner --epoch N` on your own machine; correct the environment, or the compose file with `image/pin --owner`, and deploy again",
        ),
    };
    let given = Secret::copy_of(owner.word.as_bytes());
    if own.is_some_and(|own| given.matches(own.as_bytes())) {
        Ok(Some(Proof { epoch: owner.epoch }))
    } else {
        Err(Problem::new("CVM_OWNER", rule, hint))
    }
}

/// The door that is open on dstack as long as `CVM_OWNER` is not set.
pub fn unowned() -> Door {
    Door::new(
        "CVM_OWNER is not set",
        "on dstack whoever reaches the host can replace this machine's environment",
        "print it with `cvm derive owner` on your own machine, write it into the compose file with `image/pin --owner`, \
         and deploy again",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::env::Environment;

    const KEY: &str = "kqkwGlAAGBFcUhH9pdY8mDWBZQBOgP2Kq4dkAQvqBjo=";
    const WEAK: (&str, &str) = ("ALLOW_WEAK_MASTER_KEY", "1");
    const OTHER: &str = "VtHNhXzJ3pa2NhZzK4G8hm1oUtzbwBnXoV7qkQbSdqQ=";

    fn config(given: &[(&str, &str)]) -> Result<Config, Vec<Problem>> {
        let pairs = given.iter().map(|(n, v)| (n.as_bytes().to_vec(), v.as_bytes().to_vec()));
        Config::parse(&Environment::new(pairs)).map(|(config, _)| config)
    }

    /// The proven epoch, or the name of the refused variable.
    fn outcome(given: &[(&str, &str)]) -> Result<Option<u32>, String> {
        let config = config(given).map_err(|problems| problems[0].variable.clone())?;
        prove(&config).map(|proof| proof.map(|proof| proof.epoch.get())).map_err(|problem| problem.variable)
    }

    fn word(key: &str, epoch: &str) -> String {
        let master = keys::MasterKey::new(Secret::copy_of(key.as_bytes())).unwrap();
        keys::owner_word(&master, Epoch::new(epoch.parse().unwrap()).unwrap()).to_string()
    }

    #[test]
    fn only_the_key_and_the_epoch_that_the_compose_file_names_prove_the_owner() {
        let (first, third) = (word(KEY, "0"), word(KEY, "3"));
        assert_eq!(outcome(&[("CVM_OWNER", &first), ("MASTER_KEY", KEY)]), Ok(Some(0)));
        assert_eq!(outcome(&[("CVM_OWNER", &first.to_uppercase()), ("MASTER_KEY", KEY)]), Ok(Some(0)));
        let raised = [("CVM_OWNER", third.as_str()), ("MASTER_KEY", KEY), ("CVM_OWNER_EPOCH", "3")];
        assert_eq!(outcome(&raised), Ok(Some(3)));
        let refused = Err("CVM_OWNER".to_owned());
        for forged in [
            // another key, no key
            &[("CVM_OWNER", first.as_str()), ("MASTER_KEY", OTHER)][..],
            &[("CVM_OWNER", &first)],
            // an older environment with the present compose file, and the reverse
            &[("CVM_OWNER", &third), ("MASTER_KEY", KEY)],
            &[("CVM_OWNER", &third), ("MASTER_KEY", KEY), ("CVM_OWNER_EPOCH", "2")],
            &[("CVM_OWNER", &first), ("MASTER_KEY", KEY), ("CVM_OWNER_EPOCH", "3")],
            // the owner's own mistake
            &[("CVM_OWNER", &first.replace('1', "2")), ("MASTER_KEY", KEY)],
            &[("CVM_OWNER", &first[1..]), ("MASTER_KEY", KEY)],
        ] {
            assert_eq!(outcome(forged), refused, "{forged:?}");
        }
        assert_eq!(outcome(&[("MASTER_KEY", KEY)]), Ok(None), "without an owner nothing is proven");
    }

    #[test]
    fn a_token_proves_the_owner_whatever_the_key() {
        // printf %s "$CVM_OWNER_TOKEN" | sha256sum
        let owner = "dfcd15cd582805b23f7df8ab44601f88f141f753c5911d6b01d47e2e3b717a51";
        for key in [KEY, "correct horse battery staple"] {
            let given = [("CVM_OWNER", owner), ("CVM_OWNER_TOKEN", OTHER), ("MASTER_KEY", key), WEAK];
            assert_eq!(outcome(&given), Ok(Some(0)));
        }
        let by_key = word(KEY, "0");
        let both = [("CVM_OWNER", by_key.as_str()), ("CVM_OWNER_TOKEN", OTHER), ("MASTER_KEY", KEY)];
        assert_eq!(outcome(&both), Err("CVM_OWNER".into()), "with a token, it is the token that counts");
    }

    #[test]
    fn what_can_be_guessed_proves_nothing() {
        let weak = "correct horse battery staple";
        let by_weak = word(weak, "0");
        let given = [("CVM_OWNER", by_weak.as_str()), ("MASTER_KEY", weak), WEAK];
        assert_eq!(outcome(&given), Err("CVM_OWNER_TOKEN".into()));
        let short =
            [("CVM_OWNER", word(KEY, "0")), ("MASTER_KEY", KEY.into()), ("CVM_OWNER_TOKEN", weak.into())];
        let short = short.each_ref().map(|(name, value)| (*name, value.as_str()));
        assert_eq!(outcome(&short), Err("CVM_OWNER_TOKEN".into()));
    }

    #[test]
    fn no_refusal_shows_a_value() {
        let by_key = word(KEY, "3");
        let Ok(config) = config(&[("CVM_OWNER", &by_key), ("MASTER_KEY", OTHER), ("CVM_OWNER_EPOCH", "3")])
        else {
            panic!("the shape is right")
        };
        let said = prove(&config).unwrap_err().to_string();
        for secret in [by_key.as_str(), KEY, OTHER, "3"] {
            assert!(!said.contains(secret), "{said}");
        }
        assert!(said.contains("cvm derive owner") && said.contains("image/pin --owner"), "{said}");
    }
}
