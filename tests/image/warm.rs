//! The compile cache that the image brings: the gateway finds it, no other gateway takes it, and nobody but root writes to it.

use crate::fixtures::turn;
use cvm_harness::engine::IMAGE;
use cvm_harness::{Engine, Network};

/// Words that a script uses.
const WORDS: &str = "
    cache=/opt/openclaw/compile-cache package=/opt/openclaw/node_modules/openclaw
    as_agent() { runuser -u openclaw -- env HOME=/home/openclaw NODE_DEBUG_NATIVE=COMPILE_CACHE \"$@\"; }
    openclaw() { \"$@\" node --require /opt/openclaw/preload.cjs $package/openclaw.mjs config get gateway.port 2>&1; }
";

/// What a shell script in a container of the image says, with root's rights.
fn said_by(script: &str) -> String {
    let engine = Engine::runner(&Network::new(), |host| host);
    let script = format!("{WORDS}\n{script}");
    engine.docker(&["run", "--rm", "--network", "none", "--entrypoint", "sh", IMAGE, "-c", &script])
}

#[test]
fn the_gateway_takes_the_compile_cache_of_the_image() {
    let Some(_turn) = turn() else { return };
    // By the names that Node gives its debug lines: what was cached, and what was not.
    let said = said_by(
        "mkdir /tmp/state && chown openclaw: /tmp/state
         as_agent OPENCLAW_STATE_DIR=/tmp/state OPENCLAW_NO_RESPAWN=1 OPENCLAW_GATEWAY_TOKEN=token-of-a-test-01234567 \
            node --require /opt/openclaw/preload.cjs $package/openclaw.mjs gateway run --allow-unconfigured \
            --bind loopback --port 18789 >/tmp/log 2>&1 &
         until curl --silent --fail --output /dev/null http://127.0.0.1:18789/readyz; do
            kill -0 $! || { tail -c 3000 /tmp/log; exit 1; }
            sleep 0.2
         done
         for end in accepted rejected 'not initialized'; do grep -c \"cache for .*file:.* was $end\" /tmp/log; done
         true",
    );
    let counts: Vec<usize> = said.lines().filter_map(|line| line.parse().ok()).collect();
    let [accepted, rejected, missing] = counts[..] else { panic!("{said}") };
    assert!(accepted > 4000, "{said}");
    assert_eq!(rejected, 0);
    assert!(missing < accepted / 20, "{missing} modules are not in the cache, {accepted} are");
}

#[test]
fn a_gateway_with_other_files_takes_nothing_of_the_compile_cache_for_them() {
    let Some(_turn) = turn() else { return };
    let entry = "dist/entry.js was";
    let same = said_by(&format!("openclaw as_agent | grep '{entry}'"));
    assert!(same.contains("accepted"), "{same}");
    let other = said_by(&format!(
        "echo 'console.log(\"another version\")' >>$package/dist/entry.js
         openclaw as_agent | grep -e '{entry}' -e 'another version'"
    ));
    assert!(other.contains("another version"), "{other}");
    assert!(other.contains("not initialized") && !other.contains("accepted"), "{other}");
}

#[test]
fn the_agent_neither_changes_nor_adds_anything_in_the_compile_cache() {
    let Some(_turn) = turn() else { return };
    let said = said_by(
        "cd $cache/* && victim=$(ls | head -n 1) && ls >/tmp/names
         sums() { xargs sha256sum </tmp/names 2>&1 | sha256sum; ls -A . ..; }
         before=$(sums)
         find . .. ! -user root -o -perm /022
         as_agent sh -c \"find . .. -writable; echo poison >$victim; rm -f $victim; mv $victim moved; touch added
            echo poison >/tmp/poison; mv -f /tmp/poison $victim; mv ../v* ../away; touch ../new\" 2>/dev/null
         [ \"$before\" = \"$(sums)\" ] && echo as it was
         # V8 rejects all that was compiled without --expose-gc, and Node writes at its end what it compiled anew.
         kinds() { find /tmp/node-compile-cache -name '*-990' -printf '%y\\n'; }
         openclaw as_agent 'NODE_OPTIONS=--max-old-space-size=2048 --expose-gc' |
            grep 'dist/entry.js was' | grep -o 'was [a-z]*' | sort -u; kinds
         rm -r /tmp/node-compile-cache
         openclaw as_agent | grep 'dist/entry.js was' | grep -o 'was [a-z]*' | sort -u; kinds
         [ \"$before\" = \"$(sums)\" ] && echo as it was",
    );
    assert_eq!(said, "as it was\nwas not\nd\nwas accepted\nl\nas it was", "{said}");
}

#[test]
fn root_takes_no_compile_cache_from_where_the_agent_writes() {
    let Some(_turn) = turn() else { return };
    let said = said_by(
        "made() { find /tmp -name '*-0' -path '*compile-cache*' -printf '%y\\n'; }
         bash --login -c \"$(command -v node) $package/openclaw.mjs config get gateway.port\" >/dev/null 2>&1
         echo of a login: $(made)
         openclaw env >/dev/null
         echo of a bare process: $(made)",
    );
    assert_eq!(said, "of a login:\nof a bare process: d", "{said}");
}
