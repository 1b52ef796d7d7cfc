//! Notifications of object stores: what they name is looked at again at its next access, whatever the sync interval.
//!
//! Taken as JSON on the web port (`POST /v1/events`), as S3 sends it to an HTTP endpoint, wrapped in SNS (`Message`) or SQS
//! (`Messages`, `Body`), or bare. Event format: Amazon S3 "Event message structure" 2.x. A notification only ever has the store asked
//! once more, so a false one costs a request and can show nothing that is not there.

use crate::core::Core;
use crate::store::Reader;
use forebay_common::{AbsPath, InodeId, Result, counter, err};
use forebay_ufs::UfsUri;
use serde_json::Value;

counter!(TAKEN, "forebay_master_events_total", "objects named by notifications that lie in a mount");
counter!(IGNORED, "forebay_master_events_ignored_total", "objects named by notifications that lie in no mount");

/// Wrappers of wrappers that are looked into.
const DEPTH_MAX: usize = 12;

/// One object that changed.
#[derive(Debug, PartialEq, Eq)]
pub struct Event {
    pub bucket: String,
    pub key: String,
}

/// The objects that a notification names. Errors: `InvalidArgument` for what names none.
fn parse(value: &Value, depth: usize, out: &mut Vec<Event>) -> Result<()> {
    if depth > DEPTH_MAX {
        return Err(err!(InvalidArgument, "notification wrapped more than {DEPTH_MAX} times"));
    }
    // S3's own test message when notifications are switched on.
    if value["Event"] == "s3:TestEvent" {
        return Ok(());
    }
    match value {
        Value::String(text) => {
            let inner: Value = serde_json::from_str(text).map_err(|e| err!(InvalidArgument, "notification: {e}"))?;
            return parse(&inner, depth + 1, out);
        }
        Value::Array(all) => return all.iter().try_for_each(|one| parse(one, depth + 1, out)),
        _ => {}
    }
    if let Some(records) = value["Records"].as_array() {
        return records.iter().try_for_each(|record| parse(record, depth + 1, out));
    }
    if let (Some(bucket), Some(key)) = (value["s3"]["bucket"]["name"].as_str(), value["s3"]["object"]["key"].as_str()) {
        // Form encoding: a space comes as a plus sign.
        let key = percent_encoding::percent_decode_str(&key.replace('+', " ")).decode_utf8_lossy().into_owned();
        out.push(Event { bucket: bucket.to_owned(), key });
        return Ok(());
    }
    for wrapper in ["Message", "Messages", "Body", "body"] {
        if !value[wrapper].is_null() {
            return parse(&value[wrapper], depth + 1, out);
        }
    }
    Err(err!(InvalidArgument, "notification without Records[].s3.bucket.name and .object.key"))
}

/// Takes a notification; returns how many objects it named that lie in a mount.
pub fn take_event(core: &Core, raw: &[u8]) -> Result<usize> {
    let value: Value = serde_json::from_slice(raw).map_err(|e| err!(InvalidArgument, "notification: {e}"))?;
    let mut events = Vec::new();
    parse(&value, 0, &mut events)?;
    let mounts = core.store.view().mounts()?;
    let mut taken = 0;
    for event in &events {
        let mut known = false;
        for mount in &mounts {
            let uri = UfsUri::parse(&mount.uri)?;
            let Some(key) = uri.key_of(&event.bucket, &event.key) else { continue };
            known = true;
            invalidate(core, &AbsPath::parse(&mount.path)?, key.trim_end_matches('/').as_bytes())?;
        }
        if known {
            TAKEN.inc();
            taken += 1;
        } else {
            IGNORED.inc();
        }
    }
    Ok(taken)
}

/// Has everything on the way to a key looked at again. Returns whether the key is known as a folder: what is fresh below it is not
/// found out by that.
pub fn invalidate(core: &Core, mount: &AbsPath, key: &[u8]) -> Result<bool> {
    let view = core.store.view();
    let Ok(top) = crate::namespace::walk(&view, mount) else { return Ok(false) };
    let mut folder = true;
    let mut parent = top.deepest().id();
    if key.is_empty() {
        core.syncer.invalidate_names(parent, &[]);
    }
    for name in key.split(|b| *b == b'/').filter(|name| !name.is_empty()) {
        let child = view.entry(parent, name)?;
        core.syncer.invalidate_names(parent, &[(name.to_vec(), child.as_ref().map(|c| InodeId(c.id)))]);
        match child {
            Some(child) => (parent, folder) = (InodeId(child.id), child.folder),
            None => return Ok(false),
        }
    }
    Ok(folder)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn events(raw: &str) -> Result<Vec<(String, String)>> {
        let mut out = Vec::new();
        parse(&serde_json::from_str(raw).unwrap(), 0, &mut out)?;
        Ok(out.into_iter().map(|e| (e.bucket, e.key)).collect())
    }

    #[test]
    fn reads_what_stores_send() {
        let record = r#"{"eventName":"ObjectCreated:Put","s3":{"bucket":{"name":"b"},"object":{"key":"a+b/%C3%A4","size":1}}}"#;
        let bare = format!(r#"{{"Records":[{record}]}}"#);
        let expected = vec![("b".to_owned(), "a b/ä".to_owned())];
        assert_eq!(events(&bare).unwrap(), expected);
        let sns = serde_json::json!({ "Type": "Notification", "Message": bare }).to_string();
        assert_eq!(events(&sns).unwrap(), expected);
        let sqs = serde_json::json!({ "Messages": [{ "MessageId": "1", "Body": sns }] }).to_string();
        assert_eq!(events(&sqs).unwrap(), expected);
        assert_eq!(events(r#"{"Service":"Amazon S3","Event":"s3:TestEvent","Bucket":"b"}"#).unwrap(), []);
        for bad in
            [r#"{}"#, r#"{"Records":[{}]}"#, r#""x""#, r#"{"Message":{"Message":{"Message":{"Message":{"Message":{"Message":{"Message":{}}}}}}}}"#]
        {
            assert!(events(bad).is_err(), "{bad}");
        }
    }
}
