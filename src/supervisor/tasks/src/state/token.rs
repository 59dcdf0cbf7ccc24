//! The gateway's token: derived and handed in, or random and kept on the volume.
//!
//! It is never printed; PID 1 gets it in the report, which is not a log.

use crate::files::{Dir, Kind};
use crate::report::{Failure, Outcome, Report};
use cvm_secrets::base64_bytes::PackedBytes;
use cvm_secrets::keys::GatewayToken;
use std::ffi::OsStr;

const NAME: &str = "gateway-token";
const TOKEN_MAX: usize = 1024;
/// Suffix of a file that holds no token; a number follows.
const DAMAGED: &str = "damaged";

pub(crate) fn settle(own: &Dir, given: Option<&PackedBytes>, report: &mut Report) -> Outcome<GatewayToken> {
    if let Some(packed) = given {
        let token = packed.unpack().and_then(|bytes| GatewayToken::parse(&bytes));
        return token
            .ok_or_else(|| Failure::for_good("the gateway token did not arrive whole: this is a bug"));
    }
    report.warn(
        "without MASTER_KEY the gateway token and the device identity are random and live on the volume alone: \
         losing the volume loses them. Set MASTER_KEY to have them on every machine",
    );
    let token = match stored(own, report)? {
        Some(token) => token,
        None => create(own)?,
    };
    report.facts.token = Some(PackedBytes::pack(token.expose().as_bytes()));
    Ok(token)
}

fn stored(own: &Dir, report: &mut Report) -> Outcome<Option<GatewayToken>> {
    let Some(bytes) = own.read(NAME, TOKEN_MAX)? else { return Ok(None) };
    let token = GatewayToken::parse(&bytes);
    if token.is_none() {
        let aside = own.set_aside(OsStr::new(NAME), DAMAGED)?;
        report.warn(format!(
            "the stored gateway token is damaged; it is kept as {}, and a new one is made: clients need the new one",
            own.path().join(aside).display()
        ));
    }
    Ok(token)
}

fn create(own: &Dir) -> Outcome<GatewayToken> {
    // The first try practically never fails, unless the generator is stuck; the second one shows that.
    for _ in 0..2 {
        let mut random = [0; 32];
        getrandom::fill(&mut random)
            .map_err(|e| Failure::again(format!("this machine gives no random numbers ({e})")))?;
        if let Some(token) = GatewayToken::generate_from(random) {
            own.write(NAME, token.expose().as_bytes(), Kind::KEPT)?;
            return Ok(token);
        }
    }
    Err(Failure::again("this machine's random numbers are not random; no token is made from them"))
}
