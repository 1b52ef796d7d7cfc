//! The parameters of a request: names in any case, values percent-encoded.

use crate::reply::Refusal;
use forebay_common::err;
use percent_encoding::percent_decode_str;
use std::collections::BTreeMap;

/// Who asks without saying who: as `hadoop.http.staticuser.user` there.
const NOBODY: &str = "dr.who";

#[derive(Debug)]
pub struct Params(BTreeMap<String, String>);

impl Params {
    pub fn parse(query: &str) -> Params {
        let decoded = |text: &str| percent_decode_str(&text.replace('+', " ")).decode_utf8_lossy().into_owned();
        let pairs = query.split('&').filter(|pair| !pair.is_empty()).map(|pair| pair.split_once('=').unwrap_or((pair, "")));
        Params(pairs.map(|(name, value)| (decoded(name).to_ascii_lowercase(), decoded(value))).collect())
    }

    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str).filter(|value| !value.is_empty() && *value != "null")
    }

    pub fn required(&self, name: &str) -> Result<&str, Refusal> {
        self.get(name).ok_or_else(|| Refusal::of(err!(InvalidArgument, "Required param {name} for the operation is null")))
    }

    /// On whose behalf. Errors: for another one, by a user that may not act for others.
    pub fn user(&self, proxy_users: &[String]) -> Result<&str, Refusal> {
        let own = self.get("user.name").unwrap_or(NOBODY);
        match self.get("doas").filter(|user| *user != own) {
            Some(user) if proxy_users.iter().any(|proxy| proxy == own) => Ok(user),
            Some(user) => Err(Refusal::of(err!(PermissionDenied, "User: {own} is not allowed to impersonate {user}"))),
            None => Ok(own),
        }
    }

    pub fn number(&self, name: &str) -> Result<Option<u64>, Refusal> {
        let parsed =
            self.get(name).map(|text| text.parse().map_err(|_| Refusal::of(err!(InvalidArgument, "Invalid value for parameter {name}: {text}"))));
        parsed.transpose()
    }

    pub fn flag(&self, name: &str, default: bool) -> Result<bool, Refusal> {
        match self.get(name) {
            None => Ok(default),
            Some(text) if text.eq_ignore_ascii_case("true") => Ok(true),
            Some(text) if text.eq_ignore_ascii_case("false") => Ok(false),
            Some(text) => Err(Refusal::of(err!(InvalidArgument, "Invalid value for parameter {name}: {text} is neither true nor false"))),
        }
    }

    /// Permission bits in octal.
    pub fn mode(&self) -> Result<Option<u32>, Refusal> {
        let Some(text) = self.get("permission") else { return Ok(None) };
        let mode = u32::from_str_radix(text, 8).ok().filter(|mode| *mode <= 0o1777);
        mode.map(Some).ok_or_else(|| Refusal::of(err!(InvalidArgument, "Invalid value for parameter permission: {text}")))
    }

    /// All of them, as a query, for whoever is sent on.
    pub fn encode(&self) -> String {
        let encoded = |text: &str| percent_encoding::utf8_percent_encode(text, percent_encoding::NON_ALPHANUMERIC).to_string();
        self.0.iter().map(|(name, value)| format!("{}={}", encoded(name), encoded(value))).collect::<Vec<_>>().join("&")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries_are_read_as_they_come() {
        let params = Params::parse("op=OPEN&User.Name=a%20b&offset=12&permission=0755&length=null&overwrite=TRUE&x");
        assert_eq!((params.get("op"), params.user(&[]).unwrap(), params.get("length")), (Some("OPEN"), "a b", None));
        assert_eq!(params.number("offset").unwrap(), Some(12));
        assert_eq!((params.mode().unwrap(), params.flag("overwrite", false).unwrap()), (Some(0o755), true));
        assert!(Params::parse("offset=-1").number("offset").is_err() && Params::parse("permission=9").mode().is_err());
        assert_eq!(Params::parse("").user(&[]).unwrap(), NOBODY);
        let other = Params::parse("user.name=a&doas=b");
        assert!(other.user(&[]).is_err());
        assert_eq!(other.user(&["a".to_owned()]).unwrap(), "b");
        let again = Params::parse(&params.encode());
        assert_eq!((again.user(&[]).unwrap(), again.get("offset")), ("a b", Some("12")));
    }
}
