use proptest::prelude::*;

use super::*;

fn environment(pairs: &[(&str, &str)]) -> Environment {
    Environment::new(pairs.iter().map(|(name, value)| (name.as_bytes().to_vec(), value.as_bytes().to_vec())))
}

fn value(env: &Environment, name: &str) -> Option<String> {
    match env.given(name) {
        Given::As(value) => Some(value.expose_str().unwrap().to_owned()),
        Given::Not | Given::Unusable => None,
    }
}

fn passed(env: &Environment) -> Vec<String> {
    env.passthrough().map(|(name, _)| String::from_utf8_lossy(name).into_owned()).collect()
}

fn warned(env: &Environment) -> Vec<String> {
    env.warnings().iter().map(ToString::to_string).collect()
}

fn problems(env: &Environment) -> Vec<String> {
    env.problems().iter().map(ToString::to_string).collect()
}

#[test]
fn the_table_names_each_variable_once_and_explains_it_in_one_line() {
    for (index, variable) in VARIABLES.iter().enumerate() {
        assert!(VARIABLES[..index].iter().all(|earlier| earlier.name != variable.name), "{}", variable.name);
        assert!(!variable.meaning.is_empty() && !variable.meaning.contains('\n'), "{}", variable.name);
        assert!(variable.meaning.len() < 100, "{}", variable.name);
        assert!(
            !(variable.secret && variable.default.is_some()),
            "{}: no secret has a default",
            variable.name
        );
    }
}

#[test]
fn what_the_supervisor_sets_is_no_variable_of_the_user() {
    for name in SET_BY_SUPERVISOR.iter().chain(NEVER_PASSED).chain(OPERATORS) {
        assert!(variable(name).is_none(), "{name}");
    }
}

#[test]
fn names_of_the_table_are_no_slips_of_each_other() {
    let env =
        Environment::new(VARIABLES.iter().map(|variable| (variable.name.as_bytes().to_vec(), b"x".to_vec())));
    assert_eq!(warned(&env), Vec::<String>::new());
}

#[test]
fn an_empty_value_means_unset() {
    let env = environment(&[("MASTER_KEY", ""), ("OPENAI_API_KEY", ""), ("S3_BUCKET_FILE", "")]);
    assert!(!env.is_given("MASTER_KEY"));
    assert!(passed(&env).is_empty() && env.warnings().is_empty() && env.problems().is_empty());
}

#[test]
fn the_last_of_two_values_counts_and_a_warning_says_so() {
    let env = environment(&[("S3_BUCKET", "one"), ("S3_BUCKET", "two")]);
    assert_eq!(value(&env, "S3_BUCKET").unwrap(), "two");
    assert_eq!(warned(&env), ["S3_BUCKET is set more than once; the last value counts"]);
    assert!(!environment(&[("S3_BUCKET", "one"), ("S3_BUCKET", "")]).is_given("S3_BUCKET"));
}

#[test]
fn a_secret_comes_from_its_file_without_the_line_breaks_at_its_end() {
    for (content, expected) in [
        (&b"key"[..], "key"),
        (b"key\n", "key"),
        (b"key\r\n", "key"),
        (b"key\n\n\r\n", "key"),
        (b" key \n", " key "),
        (b"a\nb\n", "a\nb"),
    ] {
        let mut env = environment(&[("MASTER_KEY_FILE", "/run/secrets/key")]);
        assert_eq!(env.wanted_files(), [("MASTER_KEY", PathBuf::from("/run/secrets/key"))]);
        env.with_file("MASTER_KEY", Ok(content.to_vec()));
        assert_eq!(value(&env, "MASTER_KEY").unwrap(), expected);
        assert!(env.wanted_files().is_empty() && env.problems().is_empty());
    }
}

#[test]
fn a_file_that_gives_no_secret_is_a_mistake_and_not_the_same_as_unset() {
    let no_file = Err(String::from("No such file or directory (os error 2)"));
    for (content, rule) in [
        (no_file, "cannot be read: No such file or directory (os error 2)"),
        (Ok(b"\n".to_vec()), "names an empty file"),
        (Ok(b"a\0b".to_vec()), "names a file with NUL bytes"),
    ] {
        let mut env = environment(&[("MASTER_KEY_FILE", "the-key-itself-by-mistake")]);
        env.with_file("MASTER_KEY", content);
        assert_eq!(env.problems().len(), 1);
        assert_eq!(
            (env.problems()[0].variable.as_str(), env.problems()[0].rule.as_str()),
            ("MASTER_KEY_FILE", rule)
        );
        assert!(!problems(&env)[0].contains("by-mistake"));
        assert!(matches!(env.given("MASTER_KEY"), Given::Unusable));
    }
}

#[test]
fn a_file_that_the_agent_could_read_is_a_mistake_and_not_the_same_as_unset() {
    let mut env = environment(&[("MASTER_KEY_FILE", "the-key-itself-by-mistake")]);
    env.with_exposed_file("MASTER_KEY", "mounting: Operation not permitted");
    env.with_exposed_file("PATH", "nothing of it was wanted");
    let said = problems(&env);
    assert!(said.len() == 1 && said[0].starts_with("MASTER_KEY_FILE: names a file that others"), "{said:?}");
    assert!(said[0].contains("mode 0400") && !said[0].contains("by-mistake"), "{said:?}");
    assert!(matches!(env.given("MASTER_KEY"), Given::Unusable));
}

#[test]
fn a_file_that_nobody_read_is_not_the_same_as_unset() {
    let env = environment(&[("MASTER_KEY_FILE", "/x")]);
    assert!(matches!(env.given("MASTER_KEY"), Given::Unusable));
    assert!(problems(&env)[0].starts_with("MASTER_KEY_FILE: was not read"));
}

#[test]
fn a_secret_given_twice_is_a_mistake() {
    let env = environment(&[("MASTER_KEY", "k"), ("MASTER_KEY_FILE", "/x")]);
    assert!(env.wanted_files().is_empty());
    assert_eq!(problems(&env), ["MASTER_KEY: is set together with MASTER_KEY_FILE (unset one of the two)"]);
}

#[test]
fn a_file_that_was_not_wanted_changes_nothing() {
    let mut env = environment(&[("MASTER_KEY", "k")]);
    env.with_file("MASTER_KEY", Ok(b"other".to_vec()));
    env.with_file("PATH", Ok(b"other".to_vec()));
    assert_eq!(value(&env, "MASTER_KEY").unwrap(), "k");
    assert!(passed(&env).is_empty());
}

#[test]
fn only_secrets_come_from_files() {
    let env = environment(&[("S3_BUCKET_FILE", "/x")]);
    assert!(env.wanted_files().is_empty());
    assert_eq!(warned(&env), ["S3_BUCKET_FILE has no effect; only secrets can be given as a file"]);
}

#[test]
fn the_gateway_gets_what_is_not_ours_and_what_is_meant_for_it() {
    let mut pairs: Vec<(&str, &str)> = VARIABLES.iter().map(|variable| (variable.name, "x")).collect();
    pairs.extend(SET_BY_SUPERVISOR.iter().chain(NEVER_PASSED).chain(OPERATORS).map(|name| (*name, "x")));
    pairs.extend([("ANTHROPIC_API_KEY", "x"), ("OPENCLAW_LOG_LEVEL", "x"), ("AWS_CA_BUNDLE", "x")]);
    assert_eq!(
        passed(&environment(&pairs)),
        [
            "ANTHROPIC_API_KEY",
            "AWS_CA_BUNDLE",
            "DSTACK_APP_ID",
            "OPENCLAW_GATEWAY_PORT",
            "OPENCLAW_LOG_LEVEL",
            "REDPILL_API_KEY",
        ]
    );
}

#[test]
fn the_gateway_gets_its_key_also_when_it_came_from_a_file() {
    let mut env = environment(&[("REDPILL_API_KEY_FILE", "/x"), ("MUX_REGISTER_KEY_FILE", "/y")]);
    env.with_file("REDPILL_API_KEY", Ok(b"key\n".to_vec()));
    env.with_file("MUX_REGISTER_KEY", Ok(b"key\n".to_vec()));
    assert_eq!(passed(&env), ["REDPILL_API_KEY"]);
}

#[test]
fn names_and_values_that_are_no_text_pass_through() {
    let env = Environment::new([(b"N\xff".to_vec(), b"\xfe".to_vec())]);
    let all: Vec<_> =
        env.passthrough().map(|(name, value)| (name.to_vec(), value.expose().to_vec())).collect();
    assert_eq!(all, [(b"N\xff".to_vec(), b"\xfe".to_vec())]);
}

#[test]
fn names_that_no_process_could_inherit_are_dropped() {
    let env = environment(&[("", "x"), ("A=B", "x"), ("A\0B", "x")]);
    assert!(passed(&env).is_empty());
}

#[test]
fn a_slip_of_the_pen_is_answered_with_the_right_name() {
    for (slip, meant) in [
        ("S3_BUKET", "S3_BUCKET"),
        ("S3_BUCKTE", "S3_BUCKET"),
        ("s3_bucket", "S3_BUCKET"),
        ("S3BUCKET", "S3_BUCKET"),
        ("SSH_PRT", "SSH_PORT"),
        ("OPENCLAW_GATEWAY_RESTART_DLAY", "OPENCLAW_GATEWAY_RESTART_DELAY"),
    ] {
        let env = environment(&[(slip, "x")]);
        assert_eq!(
            warned(&env),
            [format!("{slip} is not a variable of openclaw-cvm; did you mean {meant}?")]
        );
        assert_eq!(passed(&env), [slip]);
    }
    let env = environment(&[("MASTER_KEY_FIEL", "x")]);
    assert!(warned(&env)[0].contains("did you mean MASTER_KEY_FILE?"));
}

#[test]
fn a_secret_under_a_misspelt_name_does_not_reach_the_gateway() {
    let env = environment(&[("MASTERKEY", "the secret"), ("AWS_SECRET_ACCES_KEY", "the other")]);
    assert!(passed(&env).is_empty());
    assert!(warned(&env)[1].ends_with("did you mean MASTER_KEY? It is not passed to the gateway."));
}

#[test]
fn names_of_others_are_no_slips() {
    for name in [
        "AWS_REGION",
        "AWS_PROFILE",
        "OPENAI_API_KEY",
        "MISTRAL_API_KEY",
        "S3_KEY",
        "SSH_AUTH_SOCK",
        "LOG_FILE",
        "OPENCLAW_GATEWAY_URL",
        "OPENCLAW_GATEWAY_PASSWORD",
        "OPENCLAW_STATE_DIR",
        "HOSTNAME",
        "RCLONE_CONFIG",
        "DSTACK_APP_NAME",
        "MASTER_KEY_FILE",
    ] {
        assert_eq!(warned(&environment(&[(name, "x")])), Vec::<String>::new(), "{name}");
    }
}

#[test]
fn distance_counts_the_four_slips_of_a_typist() {
    for (a, b, expected) in [
        ("abcd", "abcd", Some(0)),
        ("abcd", "abd", Some(1)),
        ("abcd", "abxcd", Some(1)),
        ("abcd", "abxd", Some(1)),
        ("abcd", "acbd", Some(1)),
        ("abcd", "badc", Some(2)),
        ("abcd", "wxyz", None),
        ("", "ab", Some(2)),
        ("", "abc", None),
    ] {
        assert_eq!(distance(a.as_bytes(), b.as_bytes(), 2), expected, "{a} {b}");
    }
}

#[test]
fn the_inventory_lists_names_and_neither_values_nor_lengths() {
    let of = |master: &str| {
        environment(&[
            ("MASTER_KEY", master),
            ("S3_BUCKET", "canary-22"),
            ("MUX_REGISTER_KEY_FILE", "/canary"),
            ("SOMETHING_ELSE", "canary"),
            ("A\u{1b}[31m", "canary"),
            ("PATH", "canary"),
        ])
        .inventory()
    };
    assert_eq!(
        of("canary-1"),
        "Variables set: MASTER_KEY, S3_BUCKET, MUX_REGISTER_KEY (unusable); passed on to the gateway besides: \
         A\\u{1b}[31m, SOMETHING_ELSE."
    );
    assert_eq!(
        of("canary-1"),
        of(&"a longer canary".repeat(20)),
        "the line depends on the length of a secret"
    );
    assert_eq!(environment(&[]).inventory(), "Variables set: none; passed on to the gateway besides: none.");
    let many: Vec<String> = (0..70).map(|n| format!("VARIABLE_{n}")).collect();
    let many: Vec<(&str, &str)> = many.iter().map(|name| (name.as_str(), "x")).collect();
    assert!(environment(&many).inventory().ends_with(" and 6 more."));
}

#[test]
fn a_foreign_text_cannot_break_or_colour_a_line() {
    assert_eq!(shown("a\n\u{1b}[31m\u{202e}é"), "a\\n\\u{1b}[31m\\u{202e}é");
    assert_eq!(shown(&"x".repeat(41)), format!("{}...", "x".repeat(40)));
}

proptest! {
    #[test]
    fn any_environment_is_read_and_its_messages_fit_a_line(
        pairs in prop::collection::vec((prop::collection::vec(any::<u8>(), 0..20), prop::collection::vec(any::<u8>(), 0..20)), 0..20)
    ) {
        let env = Environment::new(pairs);
        for line in warned(&env).into_iter().chain(problems(&env)).chain([env.inventory()]) {
            prop_assert!(!line.chars().any(char::is_control));
        }
    }

    #[test]
    fn what_passes_through_is_what_came_in(
        name in "[A-Z]{12,20}", value in prop::collection::vec(1_u8.., 1..50)
    ) {
        let env = Environment::new([(name.clone().into_bytes(), value.clone())]);
        let all: Vec<_> = env.passthrough().map(|(name, value)| (name.to_vec(), value.expose().to_vec())).collect();
        prop_assert_eq!(all, [(name.into_bytes(), value)]);
    }
}
