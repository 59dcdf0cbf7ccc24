//! Addresses of the mux-server: where a request goes, and whether the runtime token may go with it.
//!
//! Every address is a [`Uri`] as hyper parses it, and the request goes to that very value. So the token
//! is never given by one reading of an address and sent by another.

use cvm_mux_contract::outbound::FILES_PATH;
use hyper::Uri;
use hyper::http::uri::Scheme;

/// The base of all paths of the mux-server.
#[derive(Clone)]
pub(crate) struct ServerAddress {
    /// Without a slash at its end.
    text: String,
    uri: Uri,
}

/// Where a file is.
#[derive(Debug)]
pub(crate) struct FileAddress {
    pub(crate) uri: Uri,
    /// The mux-server keeps it for this instance, so the runtime token goes along.
    pub(crate) is_ours: bool,
}

impl ServerAddress {
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let text = text.trim_end_matches('/').to_owned();
        match text.parse::<Uri>() {
            Ok(uri) if origin(&uri).is_some() => Ok(Self { text, uri }),
            _ => Err("the address of the mux-server is none that can be asked".to_owned()),
        }
    }

    pub(crate) fn is_https(&self) -> bool {
        self.uri.scheme() == Some(&Scheme::HTTPS)
    }

    /// A path of the contract, which always makes an address.
    pub(crate) fn at(&self, path: &str) -> Uri {
        format!("{}{path}", self.text).parse().unwrap_or_default()
    }

    /// The file that an attachment names; none if it may not be fetched.
    pub(crate) fn file(&self, url: &str) -> Option<FileAddress> {
        let is_path = url.starts_with('/') && !url.starts_with("//");
        let uri: Uri = if is_path { format!("{}{url}", self.text).parse() } else { url.parse() }.ok()?;
        let origin_of_file = origin(&uri)?;
        let below = uri.path().strip_prefix(self.uri.path().trim_end_matches('/'));
        // A path with steps up, escapes or empty segments may mean another one to the server.
        let is_plain =
            |path: &str| !path.contains("..") && !path.contains(['%', '\\']) && !path.contains("//");
        let is_file = below.is_some_and(|rest| rest.starts_with(FILES_PATH) && is_plain(rest));
        let is_ours = is_file && origin(&self.uri) == Some(origin_of_file);
        let is_https = uri.scheme() == Some(&Scheme::HTTPS);
        (is_ours || is_https).then_some(FileAddress { uri, is_ours })
    }
}

/// Scheme, host and port, in one form. None for an address with a user name: no file has one.
fn origin(uri: &Uri) -> Option<(Scheme, String, u16)> {
    let scheme = uri.scheme()?.clone();
    let usual = if scheme == Scheme::HTTPS { 443 } else { 80 };
    let authority = uri.authority().filter(|authority| !authority.as_str().contains('@'))?;
    Some((scheme, authority.host().to_ascii_lowercase(), authority.port_u16().unwrap_or(usual)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn file(base: &str, url: &str) -> Option<FileAddress> {
        ServerAddress::parse(base).unwrap().file(url)
    }

    #[test]
    fn our_token_goes_to_the_mux_server_and_nowhere_else() {
        let base = "https://mux.example.org";
        let at = |url: &str| file(base, url);
        assert_eq!(
            at("/v1/mux/files/telegram?x=1").unwrap().uri,
            "https://mux.example.org/v1/mux/files/telegram?x=1"
        );
        for ours in [
            "/v1/mux/files/telegram?x=%2F..",
            "https://mux.example.org/v1/mux/files/whatsapp?a",
            "https://mux.example.org:443/v1/mux/files/telegram",
            "HTTPS://MUX.example.org/v1/mux/files/a",
        ] {
            assert!(at(ours).unwrap().is_ours, "{ours}");
        }
        assert!(
            file("https://mux.example.org:443", "https://mux.example.org/v1/mux/files/a").unwrap().is_ours
        );
        let below = |url: &str| file("https://example.org/mux/", url).unwrap().is_ours;
        assert!(
            below("https://example.org/mux/v1/mux/files/a") && !below("https://example.org/v1/mux/files/a")
        );
        for other in [
            "/v1/x",
            "https://mux.example.org/v1/admin",
            "https://mux.example.org:444/v1/mux/files/telegram",
            "/v1/mux/files/../admin",
            "/v1/mux/files/%2e%2e/admin",
            "/v1/mux/files//a",
            "https://mux.example.org.evil.example/v1/mux/files/a",
            "https://evil.example/v1/mux/files/a?https://mux.example.org/v1/mux/files/a",
            "https://cdn.example.org/a.png",
        ] {
            assert!(!at(other).unwrap().is_ours, "{other}");
        }
        for nowhere in [
            "//evil.example/x",
            "http://127.0.0.1/x",
            "http://mux.example.org/v1/mux/files/a",
            "file:///x",
            "https://mux.example.org@evil.example/v1/mux/files/a",
            "https://mux.example.org:443@evil.example/v1/mux/files/a",
            "https://mux.example.org\\@evil.example/v1/mux/files/a",
            "https:///v1/mux/files/a",
            "",
        ] {
            assert!(at(nowhere).is_none(), "{nowhere}");
        }
    }

    proptest! {
        /// The token goes where the connection goes: to the host of the address that is asked.
        #[test]
        fn whatever_an_address_looks_like_the_token_stays_at_home(
            noise in "[@:/\\\\?#.%a-z0-9]{0,12}", tail in "[@:/\\\\?#.%a-z0-9]{0,12}",
        ) {
            for url in [
                format!("https://{noise}mux.example.org{tail}/v1/mux/files/a"),
                format!("https://mux.example.org{noise}evil.example{tail}/v1/mux/files/a"),
                format!("/v1/mux/files/{noise}{tail}"),
            ] {
                if let Some(found) = file("https://mux.example.org", &url).filter(|found| found.is_ours) {
                    prop_assert_eq!(found.uri.host(), Some("mux.example.org"));
                    prop_assert!(found.uri.path().starts_with(FILES_PATH));
                }
            }
        }
    }
}
