use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use proptest::prelude::*;

use super::*;
use crate::env::VARIABLES;

const ED25519: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIF2IEYeE/uIsINsUkH2mMuP5KUdr4bDd5mRqBOnvyJlo";
const KEY: (&str, &str) = ("MASTER_KEY", "0K9uLzQl7R8HwPAIEkdJI6NTMJt+D+GRInyU+Bbsl+M=");

const S3: [(&str, &str); 5] = [
    KEY,
    ("S3_BUCKET", "my-bucket"),
    ("S3_ENDPOINT", "https://s3.example.org"),
    ("AWS_ACCESS_KEY_ID", "AKIA"),
    ("AWS_SECRET_ACCESS_KEY", "secret"),
];

const MUX: [(&str, &str); 3] = [
    ("MUX_BASE_URL", "https://mux.example.org/"),
    ("MUX_REGISTER_KEY", "register"),
    ("MUX_INBOUND_URL", "https://me.example.org/v1/mux/inbound"),
];

fn environment(pairs: &[(&str, &str)]) -> Environment {
    Environment::new(pairs.iter().map(|(name, value)| (name.as_bytes().to_vec(), value.as_bytes().to_vec())))
}

fn parse(pairs: &[(&str, &str)]) -> Result<(Config, Vec<String>), Vec<String>> {
    let text = |problems: Vec<Problem>| problems.iter().map(ToString::to_string).collect::<Vec<_>>();
    let (config, warnings) = Config::parse(&environment(pairs)).map_err(text)?;
    Ok((config, warnings.iter().map(ToString::to_string).collect()))
}

fn right(pairs: &[(&str, &str)]) -> Config {
    match parse(pairs) {
        Ok((config, _)) => config,
        Err(problems) => panic!("{problems:?}"),
    }
}

fn wrong(pairs: &[(&str, &str)]) -> Vec<String> {
    match parse(pairs) {
        Ok(_) => panic!("{pairs:?} was accepted"),
        Err(problems) => problems,
    }
}

fn warnings(pairs: &[(&str, &str)]) -> Vec<String> {
    match parse(pairs) {
        Ok((_, warnings)) => warnings,
        Err(problems) => panic!("{problems:?}"),
    }
}

/// The only problem of `base` with `pairs` in place of its own.
fn problem(base: &[(&str, &str)], pairs: &[(&str, &str)]) -> String {
    let names: Vec<&str> = pairs.iter().map(|(name, _)| *name).collect();
    let all: Vec<_> = base.iter().filter(|(name, _)| !names.contains(name)).chain(pairs).copied().collect();
    let problems = wrong(&all);
    assert_eq!(problems.len(), 1, "{problems:?}");
    problems[0].clone()
}

fn s3(pairs: &[(&str, &str)]) -> Box<S3Settings> {
    match right(pairs).storage {
        Storage::S3(s3) => s3,
        Storage::Local => panic!("local"),
    }
}

use super::S3 as S3Settings;

fn with<'p>(base: &[(&'p str, &'p str)], more: &[(&'p str, &'p str)]) -> Vec<(&'p str, &'p str)> {
    let names: Vec<&str> = more.iter().map(|(name, _)| *name).collect();
    base.iter().filter(|(name, _)| !names.contains(name)).chain(more).copied().collect()
}

#[test]
fn nothing_set_is_a_local_instance_with_the_documented_defaults() {
    let (config, warnings) = parse(&[]).unwrap_or_else(|problems| panic!("{problems:?}"));
    assert!(matches!(config.storage, Storage::Local));
    assert!(config.master_key.is_none() && config.mux.is_none());
    assert_eq!((config.docker, config.ssh.trust_host_keys), (Docker::OffByDefault, false));
    assert_eq!(config.doors, [], "every door is shut by default");
    assert!(config.first_boot.config.is_none() && config.first_boot.workspace.is_none());
    assert_eq!((config.gateway.port.get(), config.gateway.user.as_str()), (18789, "openclaw"));
    assert_eq!(config.gateway.restart, Restart { delay_s: 5, max_delay_s: 60, reset_after_s: 600 });
    assert_eq!(config.gateway.start_timeout_s.get(), 300);
    assert_eq!(config.gateway.liveness_timeout_s.get(), 120);
    assert_eq!(config.gateway.stop_timeout_s.get(), 30);
    assert!(!config.gateway.redpill);
    assert_eq!((config.ssh.port.get(), config.ssh.authorized_keys.len()), (22, 0));
    assert_eq!(config.log, Log { format: LogFormat::Text, level: LogLevel::Info, services: false });
    assert_eq!(warnings.len(), 1);
    assert!(warnings[0].starts_with("MASTER_KEY is not set: "));
}

#[test]
fn every_default_of_the_table_is_right() {
    let defaults: Vec<_> = VARIABLES.iter().filter_map(|v| Some((v.name, v.default?))).collect();
    assert!(defaults.len() > 10);
    let config = right(&with(&defaults, &S3));
    let Storage::S3(s3) = config.storage else { panic!("local") };
    assert_eq!(
        (s3.region.as_str(), s3.provider.as_str(), s3.prefix.as_str()),
        ("us-east-1", "Other", "openclaw-data")
    );
}

#[test]
fn a_bucket_turns_s3_mode_on() {
    let s3 = s3(&S3);
    assert_eq!((s3.bucket.as_str(), s3.prefix.as_str()), ("my-bucket", "openclaw-data"));
    assert_eq!(s3.endpoint.unwrap().as_str(), "https://s3.example.org");
    assert_eq!(s3.access_key_id.expose(), b"AKIA");
    assert_eq!(s3.secret_access_key.expose(), b"secret");
    assert!(s3.session_token.is_none() && s3.crypt_override.is_none());
    assert_eq!(warnings(&S3), Vec::<String>::new());
}

#[test]
fn all_that_a_bucket_needs_is_asked_for_at_once() {
    let problems = wrong(&[("S3_BUCKET", "my-bucket")]);
    let names: Vec<&str> = problems.iter().filter_map(|text| text.split(':').next()).collect();
    assert_eq!(names, ["MASTER_KEY", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "S3_ENDPOINT"]);
}

#[test]
fn aws_needs_no_endpoint() {
    let pairs = with(&S3, &[("S3_PROVIDER", "aws"), ("S3_ENDPOINT", ""), ("AWS_SESSION_TOKEN", "t")]);
    let s3 = s3(&pairs);
    assert!(s3.endpoint.is_none());
    assert_eq!(s3.provider.as_str(), "AWS");
    assert_eq!(s3.session_token.unwrap().expose(), b"t");
}

#[test]
fn the_spans_of_the_bucket_have_defaults_and_limits() {
    let spans = |s3: Box<S3Settings>| [s3.heartbeat_s, s3.drain_s, s3.drill_s].map(Seconds::get);
    assert_eq!(spans(s3(&S3)), [60, 20, 86_400]);
    let given = [("S3_HEARTBEAT", "3600"), ("S3_DRAIN_TIMEOUT", "1"), ("S3_DRILL_INTERVAL", "0")];
    assert_eq!(spans(s3(&with(&S3, &given))), [3600, 1, 0]);
    for (name, text) in [
        ("S3_HEARTBEAT", "0"),
        ("S3_HEARTBEAT", "3601"),
        ("S3_DRAIN_TIMEOUT", "0"),
        ("S3_DRAIN_TIMEOUT", "2m"),
        ("S3_DRILL_INTERVAL", "-1"),
    ] {
        let problem = problem(&S3, &[(name, text)]);
        assert!(problem.starts_with(&format!("{name}: must be whole seconds from ")), "{problem}");
    }
}

#[test]
fn an_anchor_is_a_generation_and_a_digest() {
    let digest = "0123456789abcdef".repeat(4);
    assert!(s3(&S3).anchor.is_none());
    let text = format!("17:{}", digest.to_uppercase());
    let anchor = s3(&with(&S3, &[("STATE_ANCHOR", &text)])).anchor.unwrap();
    assert_eq!((anchor.generation(), anchor.digest()), (17, digest.as_str()));
    assert_eq!(anchor.to_string(), format!("17:{digest}"));
    let state = "0123456789abcdef".repeat(2);
    let whole = format!("17:{digest}:{state}");
    assert_eq!(s3(&with(&S3, &[("STATE_ANCHOR", &whole)])).anchor.unwrap().to_string(), whole);
    let short = &digest[1..];
    for text in [
        digest.clone(),
        format!("0:{digest}"),
        format!("+1:{digest}"),
        format!(":{digest}"),
        format!("1:{short}"),
        format!("1:{short}g"),
        format!("1:{digest}:"),
        format!("1:{digest}:{digest}"),
        format!("{whole}:1"),
        format!("99999999999999999999:{digest}"),
    ] {
        assert!(problem(&S3, &[("STATE_ANCHOR", &text)]).starts_with("STATE_ANCHOR: must be"), "{text}");
    }
}

#[test]
fn a_bucket_that_nobody_can_check_is_taken_over_on_a_word_and_never_beside_an_anchor() {
    assert!(!s3(&S3).adopt && !s3(&with(&S3, &[("S3_ADOPT", "0")])).adopt);
    let yes = with(&S3, &[("S3_ADOPT", "1")]);
    assert!(s3(&yes).adopt);
    let doors = right(&yes).doors;
    assert!(doors.len() == 1 && doors[0].name == "S3_ADOPT=1", "{doors:?}");
    assert!(right(&with(&S3, &[("S3_ADOPT", "0")])).doors.is_empty());
    let anchor = format!("17:{}", "a".repeat(64));
    assert!(!s3(&with(&S3, &[("S3_ADOPT", "0"), ("STATE_ANCHOR", &anchor)])).adopt);
    let problem = problem(&S3, &[("S3_ADOPT", "1"), ("STATE_ANCHOR", &anchor)]);
    assert!(problem.starts_with("S3_ADOPT: must not be 1 beside STATE_ANCHOR"), "{problem}");
}

#[test]
fn half_a_bucket_is_a_mistake_and_not_a_local_volume() {
    assert!(
        problem(&[KEY], &[("S3_ENDPOINT", "https://x")])
            .starts_with("S3_ENDPOINT: is set, but S3_BUCKET is not")
    );
    assert!(problem(&[KEY], &[("S3_PREFIX", "x")]).starts_with("S3_PREFIX: is set, but S3_BUCKET is not"));
    for name in [
        "S3_REGION",
        "S3_PROVIDER",
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "STATE_ANCHOR",
        "S3_ADOPT",
        "S3_HEARTBEAT",
        "S3_DRAIN_TIMEOUT",
        "S3_DRILL_INTERVAL",
    ] {
        let warnings = warnings(&[KEY, (name, "x")]);
        assert_eq!(warnings.len(), 1);
        assert!(warnings[0].starts_with(&format!("{name} has no effect without S3_BUCKET")), "{warnings:?}");
    }
}

#[test]
fn endpoints_are_urls_or_hosts_and_nothing_else() {
    for (text, expected) in [
        ("https://s3.example.org/", "https://s3.example.org"),
        ("HTTP://localhost:9000", "http://localhost:9000"),
        ("minio_1:9000", "https://minio_1:9000"),
        ("10.0.0.1", "https://10.0.0.1"),
        ("http://[::1]:3900", "http://[::1]:3900"),
    ] {
        let s3 = s3(&with(&S3, &[("S3_ENDPOINT", text)]));
        assert_eq!(s3.endpoint.unwrap().as_str(), expected);
    }
    for text in [
        "ftp://x",
        "https://",
        "https://user:canary@x",
        "user:canary@x",
        "https://x/canary",
        "https://x?canary",
        "https://x#canary",
        "x:0",
        "x:65536",
        "x:",
        "x y",
        "http://[::1",
        "http://[x]",
        "http://[::1]9",
        "-x",
        "é",
        "https://x//y",
        "x\n",
    ] {
        let problem = problem(&S3, &[("S3_ENDPOINT", text)]);
        assert!(problem.starts_with("S3_ENDPOINT: ") && !problem.contains("canary"), "{problem}");
    }
}

#[test]
fn buckets_of_all_stores_are_accepted_and_paths_are_not() {
    for text in ["abc", "my.bucket_1-X", &"x".repeat(255)] {
        assert_eq!(s3(&with(&S3, &[("S3_BUCKET", text)])).bucket.as_str(), text);
    }
    for text in ["ab", "a/b/c", "s3://bucket", "a b c", "bücket", &"x".repeat(256)] {
        assert!(problem(&S3, &[("S3_BUCKET", text)]).starts_with("S3_BUCKET: must be 3 to 255"));
    }
    assert!(problem(&S3, &[("S3_BUCKET", "bucket/folder")]).contains("S3_PREFIX"));
}

#[test]
fn a_prefix_is_a_folder_however_its_slashes_stand() {
    for (text, expected) in [("/a/b/", "a/b"), ("//a//", "a"), ("a b", "a b"), ("é", "é"), ("..a", "..a")] {
        assert_eq!(s3(&with(&S3, &[("S3_PREFIX", text)])).prefix.as_str(), expected);
    }
    for text in ["/", "a//b", "a/../b", ".", "a/.", "a\tb", &"x".repeat(513)] {
        assert!(problem(&S3, &[("S3_PREFIX", text)]).starts_with("S3_PREFIX: must "), "{text}");
    }
}

#[test]
fn regions_and_providers_are_words() {
    for (name, text) in
        [("S3_REGION", "eu west"), ("S3_REGION", "eu/1"), ("S3_PROVIDER", "A-B"), ("S3_PROVIDER", " ")]
    {
        assert!(problem(&S3, &[(name, text)]).starts_with(&format!("{name}: must ")));
    }
}

#[test]
fn credentials_with_a_stray_space_are_found_without_showing_them() {
    for name in ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"] {
        for value in ["canary ", "canary\n", "canäry"] {
            let problem = problem(&S3, &[(name, value)]);
            assert!(
                problem.starts_with(&format!("{name}: must be visible ASCII")) && !problem.contains("can")
            );
        }
    }
}

#[test]
fn crypt_passwords_come_in_pairs_and_obscured() {
    let obscured = URL_SAFE_NO_PAD.encode([0xfb; 20]);
    let pairs = [("RCLONE_CRYPT_PASSWORD", obscured.as_str()), ("RCLONE_CRYPT_PASSWORD2", &obscured)];
    let given = s3(&with(&S3, &pairs)).crypt_override.unwrap();
    assert_eq!((given.password.expose(), given.salt.expose()), (obscured.as_bytes(), obscured.as_bytes()));
    for (alone, missing) in [(0, "RCLONE_CRYPT_PASSWORD2"), (1, "RCLONE_CRYPT_PASSWORD")] {
        assert!(
            problem(&S3, &pairs[alone..=alone]).starts_with(&format!("{missing}: is needed together with"))
        );
    }
    let too_short = URL_SAFE_NO_PAD.encode([0xfb; 16]);
    let standard = STANDARD.encode([0xfb; 21]);
    for text in ["canary", &too_short, &standard, "canary with spaces, long enough for it"] {
        let problem = problem(&S3, &[pairs[0], ("RCLONE_CRYPT_PASSWORD2", text)]);
        assert!(problem.starts_with("RCLONE_CRYPT_PASSWORD2: must be in rclone's obscured form"));
        assert!(!problem.contains("canary"));
    }
}

#[test]
fn the_ca_bundle_that_rclone_chokes_on_is_pointed_out() {
    let warnings = warnings(&with(&S3, &[("AWS_CA_BUNDLE", "/x")]));
    assert!(warnings[0].starts_with("AWS_CA_BUNDLE does not reach the storage worker"));
    assert!(parse(&[KEY, ("AWS_CA_BUNDLE", "/x")]).is_ok_and(|(_, warnings)| warnings.is_empty()));
}

#[test]
fn the_master_key_is_taken_byte_for_byte() {
    let key = b" k\xffy ".to_vec();
    let allowed = (b"ALLOW_WEAK_MASTER_KEY".to_vec(), b"1".to_vec());
    let env = Environment::new([(b"MASTER_KEY".to_vec(), key.clone()), allowed]);
    let (config, warnings) = Config::parse(&env).unwrap_or_else(|problems| panic!("{problems:?}"));
    assert_eq!(config.master_key.unwrap().expose(), key);
    assert_eq!(warnings.len(), 1, "white space at its ends: {warnings:?}");
}

#[test]
fn a_master_key_that_can_be_guessed_is_refused_unless_that_is_allowed() {
    const PHRASE: (&str, &str) = ("MASTER_KEY", "correct horse battery staple");
    let refused = problem(&[], &[PHRASE]);
    assert!(refused.starts_with("MASTER_KEY: must be base64 of at least 32 random bytes"), "{refused}");
    assert!(refused.contains("set ALLOW_WEAK_MASTER_KEY=1") && !refused.contains("horse"), "{refused}");
    // The message shows neither the key nor its length.
    assert_eq!(refused, problem(&[], &[("MASTER_KEY", "short")]));

    let allowed = ("ALLOW_WEAK_MASTER_KEY", "1");
    let config = right(&[PHRASE, allowed]);
    assert_eq!(config.master_key.unwrap().expose(), PHRASE.1.as_bytes());
    assert_eq!((config.doors.len(), config.doors[0].name.as_str()), (1, "ALLOW_WEAK_MASTER_KEY=1"));
    let (elsewhere, warned) = Config::parse_elsewhere(&environment(&[PHRASE])).ok().unwrap();
    assert!(elsewhere.doors.is_empty() && warned.len() == 1 && warned[0].says.starts_with("can be guessed"));
    assert_eq!(right(&[KEY, allowed]).doors, []);
    assert_eq!(
        warnings(&[KEY, allowed]),
        ["ALLOW_WEAK_MASTER_KEY is 1 and MASTER_KEY is not weak; unset it"]
    );
    assert_eq!(
        parse(&[KEY]).ok().map(|(config, warnings)| (config.doors.len(), warnings.len())),
        Some((0, 0))
    );
}

#[test]
fn an_initial_config_is_kept_as_it_was_written() {
    let json = "{\n  \"gateway\": { \"port\": 1 }\n}\n";
    let mut base64 = STANDARD.encode(json);
    base64.insert_str(10, "\r\n ");
    for base64 in [base64.as_str(), base64.trim_end_matches('=')] {
        let config = right(&[KEY, ("OPENCLAW_CONFIG_B64", base64)]);
        assert_eq!(config.first_boot.config.unwrap().expose(), json.as_bytes());
    }
}

#[test]
fn an_initial_config_that_is_none_is_refused_without_showing_it() {
    let encode = |text: &str| STANDARD.encode(text);
    let too_large = format!("{{\"canary\":\"{}\"}}", "x".repeat(1024 * 1024));
    for (value, rule) in [
        (String::from("canary!"), "is not standard base64"),
        (encode("canary"), "must be the base64 of a JSON object"),
        (encode("[\"canary\"]"), "must be the base64 of a JSON object"),
        (encode("{\n\"canary\": }"), "is not JSON after decoding: line 2, column 11"),
        (encode("{} canary"), "is not JSON after decoding"),
        (STANDARD.encode(b"{\"\xffcanary\":1}"), "must be UTF-8 text"),
        (encode(&too_large), "must hold at most 1024 KiB"),
    ] {
        let problem = problem(&[KEY], &[("OPENCLAW_CONFIG_B64", &value)]);
        assert!(problem.starts_with(&format!("OPENCLAW_CONFIG_B64: {rule}")), "{problem}");
        assert!(!problem.contains("canary") && !problem.contains(&value));
    }
}

fn workspace(json: &str) -> Result<Config, Vec<String>> {
    let value = STANDARD.encode(json);
    parse(&[KEY, ("OPENCLAW_WORKSPACE_FILES_B64", &value)]).map(|(config, _)| config)
}

#[test]
fn workspace_files_are_paths_with_texts() {
    let config = workspace(r#"{"b/c.md":"two\n\u00e9","a.md":"","..x/.y":"z"}"#);
    let files = config.unwrap_or_else(|problems| panic!("{problems:?}")).first_boot.workspace.unwrap();
    let all: Vec<_> = files.iter().map(|(path, text)| (path, text.expose_str().unwrap())).collect();
    assert_eq!(all, [("..x/.y", "z"), ("a.md", ""), ("b/c.md", "two\né")]);
    assert_eq!((files.len(), files.is_empty()), (3, false));
}

#[test]
fn no_workspace_path_leaves_the_workspace_or_is_ambiguous() {
    let long_name = "x".repeat(256);
    let long_path = "x/".repeat(600) + "x";
    for path in [
        "/etc/passwd",
        "../x",
        "a/../../x",
        "a/..",
        ".",
        "./a",
        "a//b",
        "a/",
        "",
        "a\\\\b",
        "a\\nb",
        "a\\u0000b",
        &long_name,
        &long_path,
    ] {
        let problems = workspace(&format!("{{\"{path}\":\"canary\"}}")).err().unwrap_or_default();
        assert_eq!(problems.len(), 1, "{path}: {problems:?}");
        assert!(problems[0].starts_with("OPENCLAW_WORKSPACE_FILES_B64: path \""), "{problems:?}");
        assert!(!problems[0].contains("canary") && problems[0].len() < 250);
    }
    let both = workspace(r#"{"a":"x","a/b/c":"y","a.b":"z"}"#).err().unwrap();
    assert_eq!(both.len(), 1);
    assert!(both[0].contains("path \"a/b/c\" lies below another path that is a file"));
    let twice = workspace(r#"{"a":"x","a":"y"}"#).err().unwrap();
    assert!(twice[0].contains("path \"a\" is given twice"));
}

#[test]
fn workspace_files_that_are_none_are_refused_without_showing_them() {
    for json in
        ["[\"canary\"]", "{\"a\": 5}", "{\"a\": [\"canary\"]}", "{\"a\": \"canary\"", "{\"a\":\"canary\"} x"]
    {
        let problems = workspace(json).err().unwrap_or_default();
        assert_eq!(problems.len(), 1, "{json}");
        assert!(!problems[0].contains("canary"), "{problems:?}");
    }
    let many: Vec<String> = (0..50).map(|n| format!("\"/{n}\":\"\"")).collect();
    let problems = workspace(&format!("{{{}}}", many.join(","))).err().unwrap();
    assert_eq!(problems.len(), 21);
    assert!(problems[20].contains("has 30 more paths with mistakes"));
}

#[test]
fn seconds_are_whole_and_at_most_a_day() {
    let config =
        right(&[KEY, ("OPENCLAW_GATEWAY_RESTART_DELAY", "0"), ("OPENCLAW_GATEWAY_RESTART_MAX_DELAY", "0")]);
    assert_eq!(config.gateway.restart, Restart { delay_s: 0, max_delay_s: 0, reset_after_s: 600 });
    for text in ["-1", "+5", "5s", "1.5", " 5", "86401", "99999999999", "five"] {
        let problem = problem(&[KEY], &[("OPENCLAW_GATEWAY_RESTART_RESET_AFTER", text)]);
        assert!(problem.contains("must be whole seconds from 0 to 86400, not \""), "{problem}");
    }
    for name in [
        "OPENCLAW_GATEWAY_LIVENESS_TIMEOUT",
        "OPENCLAW_GATEWAY_START_TIMEOUT",
        "OPENCLAW_GATEWAY_STOP_TIMEOUT",
    ] {
        assert!(problem(&[KEY], &[(name, "0")]).contains("must be whole seconds from 1 to 86400"));
    }
}

#[test]
fn the_first_wait_is_not_longer_than_the_longest() {
    assert!(right(&[KEY, ("OPENCLAW_GATEWAY_RESTART_DELAY", "60")]).gateway.restart.delay_s == 60);
    let problem = problem(&[KEY], &[("OPENCLAW_GATEWAY_RESTART_DELAY", "61")]);
    assert!(problem.contains("is 61 s, more than OPENCLAW_GATEWAY_RESTART_MAX_DELAY (60 s)"), "{problem}");
}

#[test]
fn the_model_providers_key_is_checked_and_noted_but_not_kept() {
    assert!(right(&[KEY, ("REDPILL_API_KEY", "sk-1")]).gateway.redpill);
    let problem = problem(&[KEY], &[("REDPILL_API_KEY", "sk canary")]);
    assert!(problem.starts_with("REDPILL_API_KEY: must be visible ASCII") && !problem.contains("canary"));
}

#[test]
fn the_mux_client_runs_when_both_of_its_variables_are_set() {
    let mux = right(&with(&[KEY], &MUX)).mux.unwrap();
    assert_eq!(mux.base_url.as_str(), "https://mux.example.org");
    assert_eq!(mux.register_key.expose(), b"register");
    assert_eq!(mux.inbound_url.as_str(), "https://me.example.org/v1/mux/inbound");
    assert!(
        problem(&[KEY, MUX[2]], &MUX[..1])
            .starts_with("MUX_REGISTER_KEY: is needed together with MUX_BASE_URL")
    );
    assert!(
        problem(&[KEY, MUX[2]], &MUX[1..2])
            .starts_with("MUX_BASE_URL: is needed together with MUX_REGISTER_KEY")
    );
    let alone = warnings(&[KEY, MUX[2]]);
    assert!(alone[0].starts_with("MUX_INBOUND_URL has no effect"));
}

#[test]
fn the_inbound_url_follows_from_dstack_when_it_is_not_given() {
    let dstack = [("DSTACK_APP_ID", "abc123"), ("MUX_GATEWAY_DOMAIN", "dstack.example.org:12004")];
    let pairs = with(&with(&[KEY], &MUX[..2]), &dstack);
    let mux = right(&pairs).mux.unwrap();
    assert_eq!(mux.inbound_url.as_str(), "https://abc123-18790.dstack.example.org:12004/v1/mux/inbound");
    for some in [&dstack[..0], &dstack[..1], &dstack[1..]] {
        let problem = problem(&with(&[KEY], &MUX[..2]), some);
        assert!(problem.starts_with("MUX_INBOUND_URL: is needed"), "{problem}");
    }
    for (id, domain) in [("a/b", "x"), ("a", "x/y"), ("a@b", "x"), ("a", "x?y")] {
        let pairs = [("DSTACK_APP_ID", id), ("MUX_GATEWAY_DOMAIN", domain)];
        assert!(problem(&with(&[KEY], &MUX[..2]), &pairs).starts_with("MUX_INBOUND_URL: "));
    }
    assert!(warnings(&[KEY, dstack[1]])[0].starts_with("MUX_GATEWAY_DOMAIN has no effect"));
}

#[test]
fn the_host_does_not_choose_where_chats_are_sent() {
    let of_the_host = [("DSTACK_APP_ID", "abc123"), ("DSTACK_GATEWAY_DOMAIN", "evil.example.org")];
    let problem = problem(&with(&[KEY], &MUX[..2]), &of_the_host);
    assert!(problem.starts_with("MUX_INBOUND_URL: is needed"), "{problem}");
    assert!(
        problem.contains("DSTACK_GATEWAY_DOMAIN is ignored, because the CVM's host writes it"),
        "{problem}"
    );
    assert!(problem.contains("set MUX_GATEWAY_DOMAIN"), "{problem}");
    for own in [("MUX_GATEWAY_DOMAIN", "mine.example.org"), MUX[2]] {
        let pairs = with(&with(&with(&[KEY], &MUX[..2]), &of_the_host), &[own]);
        let url = right(&pairs).mux.unwrap().inbound_url;
        assert!(!url.as_str().contains("evil"), "{}", url.as_str());
    }
}

#[test]
fn what_is_sent_over_http_stays_on_this_machine_unless_that_is_allowed() {
    let inbound = |host: &str| format!("http://{host}/v1/mux/inbound");
    for host in ["127.0.0.1:9000", "127.8.9.10", "[::1]:9000", "localhost", "LOCALHOST:1"] {
        let (url, inbound) = (format!("http://{host}"), inbound(host));
        let pairs = with(
            &with(&S3, &MUX),
            &[("S3_ENDPOINT", &url), ("MUX_BASE_URL", &url), ("MUX_INBOUND_URL", &inbound)],
        );
        assert_eq!(right(&pairs).doors, [], "{host}");
    }
    for host in [
        "s3.example.org",
        "10.0.0.1:9000",
        "[fd00::1]",
        "[::ffff:127.0.0.1]",
        "127.0.0.1.example.org",
        "127.1",
        "localhost.x",
        "0.0.0.0",
    ] {
        let (url, inbound) = (format!("http://{host}"), inbound(host));
        let given = [("S3_ENDPOINT", url.as_str()), ("MUX_BASE_URL", &url), ("MUX_INBOUND_URL", &inbound)];
        let base = with(&S3, &MUX);
        let problems = wrong(&with(&base, &given));
        assert_eq!(problems.len(), 3, "{host}: {problems:?}");
        for ((name, _), problem) in given.iter().zip(&problems) {
            assert!(problem.starts_with(&format!("{name}: must be https")), "{problem}");
            assert!(problem.contains("ALLOW_HTTP=1") && !problem.contains(host), "{problem}");
        }
        let doors = right(&with(&with(&base, &given), &[("ALLOW_HTTP", "1")])).doors;
        assert_eq!(doors.len(), 1);
        assert!(doors[0].risk.starts_with("S3_ENDPOINT, MUX_BASE_URL, MUX_INBOUND_URL is"), "{}", doors[0]);
    }
    let idle = warnings(&[KEY, ("ALLOW_HTTP", "1")]);
    assert_eq!(idle, ["ALLOW_HTTP is 1 and no URL needs it; unset it"]);
}

#[test]
fn each_open_door_says_who_can_do_what_and_how_to_shut_it() {
    for (name, names) in [
        ("ENABLE_DOCKER", ["root in this container", "ENABLE_DOCKER=0"]),
        ("SSH_TRUST_HOST_KEYS", ["host", "SSH_AUTHORIZED_KEYS"]),
        ("LOG_SERVICES", ["public", "cvm logs"]),
    ] {
        let doors = right(&[KEY, (name, "1")]).doors;
        assert_eq!(doors.len(), 1);
        assert_eq!(doors[0].name, format!("{name}=1"));
        assert!(doors[0].risk.contains(names[0]) && doors[0].remedy.contains(names[1]), "{}", doors[0]);
        assert_eq!(right(&[KEY, (name, "0")]).doors, []);
    }
    assert_eq!(right(&[KEY, ("ENABLE_DOCKER", "1")]).docker, Docker::On);
    assert!(right(&[KEY, ("SSH_TRUST_HOST_KEYS", "1")]).ssh.trust_host_keys);
}

#[test]
fn the_inbound_url_ends_where_the_client_listens() {
    for text in [
        "https://x/v1/mux/inbound/",
        "https://x/v1/mux",
        "https://x",
        "x/v1/mux/inbound",
        "https://x/v1/mux/inbound?a=1",
        "https://a:canary@x/v1/mux/inbound",
    ] {
        let problem = problem(&with(&[KEY], &MUX), &[("MUX_INBOUND_URL", text)]);
        assert!(problem.starts_with("MUX_INBOUND_URL: must ") && !problem.contains("canary"), "{problem}");
    }
}

#[test]
fn authorized_keys_are_checked_line_by_line() {
    let rsa = ssh_key("ssh-rsa", &[&[1, 0, 1], &[0x7f; 257]]);
    let sk = ssh_key("sk-ssh-ed25519@openssh.com", &[&[1; 32], b"ssh:"]);
    let ecdsa = ssh_key("ecdsa-sha2-nistp256", &[b"nistp256", &[4; 65]]);
    let text = format!(
        "# team\r\n\r\n{ED25519} a comment\r\n  from=\"10.0.0.1, 10.0.0.2\",command=\"echo \\\"hi\\\" \" {rsa} b\n{sk}\n\
         cert-authority {ecdsa}\n"
    );
    let keys = right(&[KEY, ("SSH_AUTHORIZED_KEYS", &text)]).ssh.authorized_keys;
    assert_eq!(keys.len(), 4);
    assert_eq!((keys[0].line(), keys[0].identity()), (format!("{ED25519} a comment").as_str(), ED25519));
    assert!(
        keys[1].line().starts_with("from=") && keys[1].identity().ends_with(rsa.split(' ').nth(1).unwrap())
    );
    assert_eq!(keys[3].identity(), format!("cert-authority {ecdsa}"));
}

/// A public key line of the given type and fields.
fn ssh_key(name: &str, fields: &[&[u8]]) -> String {
    let mut blob = Vec::new();
    for field in std::iter::once(&name.as_bytes()).chain(fields) {
        blob.extend_from_slice(&u32::try_from(field.len()).unwrap().to_be_bytes());
        blob.extend_from_slice(field);
    }
    format!("{name} {}", STANDARD.encode(blob))
}

#[test]
fn keys_that_sshd_would_skip_without_a_word_are_named_by_line() {
    let rsa_body = ssh_key("ssh-rsa", &[&[1], &[2]]).replace("ssh-rsa ", "");
    for (line, rule) in [
        ("ssh-dss AAAAB3NzaC1kc3MAAACB canary", "is a DSA key"),
        ("no-pty ssh-dss AAAAB3NzaC1kc3MAAACB canary", "is a DSA key"),
        ("canary", "is not of a known key type"),
        ("ssh-ed25519", "holds a damaged key"),
        ("ssh-ed25519 canary!", "holds no valid base64"),
        (&ED25519[..ED25519.len() - 4], "holds a damaged key"),
        (&ED25519[..ED25519.len() - 1], "holds no valid base64"),
        (&format!("ssh-ed25519 {rsa_body}"), "holds a key of another type than it says"),
        (&ssh_key("ssh-ed25519", &[&[1; 31]]), "holds a damaged key"),
        (&ssh_key("ssh-rsa", &[&[1]]), "holds a damaged key"),
        ("-----BEGIN OPENSSH PRIVATE KEY-----", "is a private key"),
        (&format!("{ED25519} \u{7}"), "contains control characters"),
    ] {
        let text = format!("# one\n{ED25519}\r\n\n{line}");
        let problem = problem(&[KEY], &[("SSH_AUTHORIZED_KEYS", &text)]);
        assert!(problem.starts_with(&format!("SSH_AUTHORIZED_KEYS: line 4 {rule}")), "{line}: {problem}");
        assert!(!problem.contains("canary"));
    }
}

#[test]
fn switches_and_choices_take_the_documented_words_only() {
    let config = right(&[
        KEY,
        ("ENABLE_DOCKER", "false"),
        ("LOG_SERVICES", "true"),
        ("LOG_FORMAT", "json"),
        ("LOG_LEVEL", "trace"),
    ]);
    assert_eq!(config.docker, Docker::Off);
    assert_eq!(config.log, Log { format: LogFormat::Json, level: LogLevel::Trace, services: true });
    assert_eq!(config.log.level.as_str(), "trace");
    for (name, rule) in [
        ("ENABLE_DOCKER", "must be 0, 1, true or false"),
        ("ALLOW_HTTP", "must be 0, 1, true or false"),
        ("SSH_TRUST_HOST_KEYS", "must be 0, 1, true or false"),
        ("LOG_SERVICES", "must be 0, 1, true or false"),
        ("LOG_FORMAT", "must be text or json"),
        ("LOG_LEVEL", "must be error, warn, info, debug or trace"),
        ("SSH_PORT", "must be a port from 1 to 65535"),
        ("OPENCLAW_GATEWAY_PORT", "must be a port from 1 to 65535"),
    ] {
        for text in ["Yes", "0 ", "65536"] {
            assert_eq!(
                problem(&[KEY], &[(name, text)]).split(", not").next(),
                Some(&*format!("{name}: {rule}"))
            );
        }
    }
}

#[test]
fn a_wrong_value_is_shown_escaped_and_shortened() {
    let value = format!("a\n\u{1b}{}", "x".repeat(100));
    let problem = problem(&[KEY], &[("LOG_LEVEL", &value)]);
    assert!(
        problem.contains("not \"a\\n\\u{1b}xxx") && problem.contains("...\"") && problem.len() < 150,
        "{problem}"
    );
}

#[test]
fn no_two_listeners_share_a_port() {
    assert!(
        problem(&[KEY], &[("SSH_PORT", "18789")]).contains("is 18789, the same as OPENCLAW_GATEWAY_PORT")
    );
    assert!(problem(&[KEY], &[("OPENCLAW_GATEWAY_PORT", "22")]).starts_with("SSH_PORT: is 22"));
    assert!(
        problem(&[KEY], &[("SSH_PORT", "18790")])
            .starts_with("SSH_PORT: is 18790, the port of the mux client")
    );
    assert!(
        problem(&[KEY], &[("OPENCLAW_GATEWAY_PORT", "18790")]).starts_with("OPENCLAW_GATEWAY_PORT: is 18790")
    );
}

#[test]
fn user_names_are_those_of_useradd() {
    for name in ["_x", "a-b_9", &"a".repeat(32)] {
        assert_eq!(right(&[KEY, ("OPENCLAW_GATEWAY_USER", name)]).gateway.user.as_str(), name);
    }
    assert!(
        problem(&[KEY], &[("OPENCLAW_GATEWAY_USER", "root")])
            .starts_with("OPENCLAW_GATEWAY_USER: must not be root")
    );
    for name in ["Root", "9a", "-a", "a b", "a:b", "a/b", "é", &"a".repeat(33)] {
        assert!(
            problem(&[KEY], &[("OPENCLAW_GATEWAY_USER", name)]).starts_with("OPENCLAW_GATEWAY_USER: must be")
        );
    }
}

#[test]
fn an_account_that_has_more_than_the_agent_should_is_refused_before_anything_starts() {
    let passwd = "root:x:0:0::/root:/bin/sh\ntoor:x:0:0::/root:/bin/sh\nwww-data:x:33:33::/:/bin/sh\n\
                  openclaw:x:990:990::/:/bin/sh\nnode:x:1000:1000::/:/bin/sh\nopenclaw-mux:x:18790:18790::/:/bin/sh\n";
    let check = |name| right(&[KEY, ("OPENCLAW_GATEWAY_USER", name)]).check_account(passwd, "root:x:0:\n");
    for name in ["toor", "www-data", "openclaw-mux"] {
        let problem = check(name).unwrap();
        assert_eq!(problem.variable, "OPENCLAW_GATEWAY_USER");
        assert!(problem.rule.starts_with("names an account that "), "{problem}");
    }
    for name in ["openclaw", "node", "absent"] {
        assert_eq!(check(name), None, "{name}");
    }
}

#[test]
fn the_token_cannot_be_chosen() {
    for name in ["OPENCLAW_GATEWAY_TOKEN", "OPENCLAW_GATEWAY_TOKEN_FILE"] {
        let problem = problem(&[KEY], &[(name, "canary")]);
        assert!(problem.starts_with(&format!("{name}: cannot be set")) && !problem.contains("canary"));
    }
    for name in &SET_BY_SUPERVISOR[1..] {
        assert_eq!(
            warnings(&[KEY, (name, "x")]),
            [format!("{name} is set by openclaw-cvm for the gateway; your value is not used")]
        );
    }
}

#[test]
fn values_that_are_no_text_are_refused() {
    let env = Environment::new([
        (b"S3_PREFIX".to_vec(), b"\xff".to_vec()),
        (b"LOG_LEVEL".to_vec(), b"\xff".to_vec()),
    ]);
    let problems = Config::parse(&env).err().unwrap();
    assert!(problems.contains(&Problem::new("LOG_LEVEL", "must be UTF-8 text", "type the value again")));
}

#[test]
fn all_mistakes_are_reported_together() {
    let problems = wrong(&[
        ("S3_BUCKET", "x"),
        ("S3_ENDPOINT", "ftp://x"),
        ("SSH_PORT", "0"),
        ("LOG_LEVEL", "loud"),
        ("OPENCLAW_CONFIG_B64", "!"),
        ("OPENCLAW_WORKSPACE_FILES_B64", "!"),
        ("MUX_BASE_URL", "x"),
        ("SSH_AUTHORIZED_KEYS", "x\ny"),
        ("ENABLE_DOCKER", "maybe"),
        ("OPENCLAW_GATEWAY_USER", "X"),
        ("OPENCLAW_GATEWAY_RESTART_DELAY", "x"),
        ("OPENCLAW_GATEWAY_TOKEN", "x"),
    ]);
    // Among them three missing variables of S3, one of mux, and two lines of keys.
    assert_eq!(problems.len(), 17, "{problems:#?}");
}

#[test]
fn a_secret_whose_file_failed_is_not_reported_as_missing_too() {
    let pairs: Vec<_> = S3.iter().filter(|pair| pair.0 != "MASTER_KEY").copied().collect();
    let mut env = environment(&with(&pairs, &[("MASTER_KEY_FILE", "/x")]));
    env.with_file("MASTER_KEY", Err(String::from("No such file or directory")));
    let problems = Config::parse(&env).err().unwrap();
    assert_eq!(problems.len(), 1);
    assert_eq!(problems[0].variable, "MASTER_KEY_FILE");
}

/// A pair whose name is in the table, is a `_FILE` of it or has another meaning, and whose value is nearly right or
/// anything.
fn any_pair() -> impl Strategy<Value = (String, Vec<u8>)> {
    let mut names: Vec<String> = VARIABLES.iter().map(|variable| variable.name.to_owned()).collect();
    names.extend(VARIABLES.iter().map(|variable| file_twin(variable.name)));
    names.extend(SET_BY_SUPERVISOR.iter().chain(&["AWS_CA_BUNDLE", "PATH"]).map(|name| (*name).to_owned()));
    let nearly = [
        "0",
        "1",
        "22",
        "18789",
        "18790",
        "86400",
        "AWS",
        "true",
        "json",
        "bucket",
        "https://x",
        "https://x/v1/mux/inbound",
        "http://x",
        "x/../y",
        "{}",
        "e30=",
        "eyJhIjoiYiJ9",
        ED25519,
        "root",
        "[::1]:1",
        "https://[",
        "\u{1b}[31m",
    ];
    let value = prop_oneof![
        prop::sample::select(nearly.map(|text| text.as_bytes().to_vec()).to_vec()),
        prop::collection::vec(any::<u8>(), 0..60),
        any::<String>().prop_map(String::into_bytes),
        any::<String>().prop_map(|text| STANDARD.encode(text).into_bytes()),
        prop::collection::btree_map(any::<String>(), any::<String>(), 0..4)
            .prop_map(|files| STANDARD.encode(serde_json::to_string(&files).unwrap()).into_bytes()),
    ];
    (prop::sample::select(names), value)
}

proptest! {
    #[test]
    fn any_environment_gives_a_configuration_or_reasons(pairs in prop::collection::vec(any_pair(), 0..25)) {
        let env = Environment::new(pairs.into_iter().map(|(name, value)| (name.into_bytes(), value)));
        match Config::parse(&env) {
            Ok((config, warnings)) => {
                prop_assert!(matches!(config.storage, Storage::Local) || config.master_key.is_some());
                prop_assert!(config.gateway.restart.delay_s <= config.gateway.restart.max_delay_s);
                prop_assert!(warnings.iter().all(|warning| !warning.to_string().contains('\n')));
            }
            Err(problems) => {
                prop_assert!(!problems.is_empty());
                for problem in problems {
                    prop_assert!(!problem.to_string().chars().any(char::is_control), "{problem}");
                }
            }
        }
    }

    /// The mux client sends its requests with this library.
    #[test]
    fn whatever_passes_as_a_url_is_one_for_http(path in "[!-~]{0,12}", host in "[!-~]{1,6}", port in 1_u16..) {
        for text in [format!("https://{host}"), format!("http://h_1:{port}/{path}"), format!("https://[::1]/{path}")] {
            if let Ok(url) = HttpUrl::parse(&text) {
                prop_assert!(url.as_str().parse::<http::Uri>().is_ok_and(|uri| uri.authority().is_some()), "{text}");
            }
        }
    }

    #[test]
    fn no_message_holds_the_value_of_a_secret(
        shape in prop::collection::vec((any::<prop::sample::Index>(), 0_u8..6, any::<bool>()), 1..12)
    ) {
        const CANARY: &str = "C4n4rYv4lu3";
        let secrets: Vec<&str> = VARIABLES.iter().filter(|variable| variable.secret).map(|v| v.name).collect();
        let mut pairs = vec![(String::from("S3_BUCKET"), String::from("x"))];
        let mut files = Vec::new();
        for (index, form, in_file) in shape {
            let name = *index.get(&secrets);
            let value = match form {
                0 => CANARY.to_owned(),
                1 => format!("{CANARY} with a space"),
                2 => STANDARD.encode(CANARY),
                3 => STANDARD.encode(format!("{{\"a\": \"{CANARY}\", \"/b\": \"{CANARY}\"}}")),
                4 => STANDARD.encode(format!("{{\"a\": {CANARY}}}")),
                _ => format!("\u{e9}{CANARY}\n{CANARY}"),
            };
            pairs.push((if in_file { file_twin(name) } else { name.to_owned() }, value.clone()));
            files.push((name, value));
        }
        let mut env = Environment::new(pairs.into_iter().map(|(name, value)| (name.into_bytes(), value.into_bytes())));
        for (name, value) in files {
            env.with_file(name, Ok(value.into_bytes()));
        }
        let mut said = vec![env.inventory()];
        match Config::parse(&env) {
            Ok((_, warnings)) => said.extend(warnings.iter().map(ToString::to_string)),
            Err(problems) => said.extend(problems.iter().map(ToString::to_string)),
        }
        said.extend(env.warnings().iter().map(ToString::to_string));
        for line in said {
            for piece in [CANARY, &STANDARD.encode(CANARY)[..12]] {
                prop_assert!(!line.contains(piece), "{line}");
            }
        }
    }
}
