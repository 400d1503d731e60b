//! Webhooks: Infisical's reports that a folder has changed, and the proof that Infisical sent them,
//! and just now.
//!
//! The header `x-infisical-signature` is `t=<ms>;<hex>`, where the hex digits are HMAC-SHA256 of
//! the body as it was sent, under a secret that both sides know. The time in the header is not
//! signed: anybody who has a webhook of last year could send it with today's time. So the age of a
//! webhook is counted from the time in the body, which is signed; the time in the header must be as
//! recent, but proves nothing beyond that. Within that time a webhook could be sent again: an
//! instance that accepts it keeps its [`WebhookCall::digest`], to recognise it.

use std::{fmt, time::Duration};

use hmac::{Hmac, KeyInit as _, Mac as _};
use serde::Deserialize;
use sha2::{Digest as _, Sha256};

use super::{BuildError, Config, SharedFolder, is_within};
use crate::{
    clock::Timestamp,
    object::Object,
    secret::SecretValue,
    tiers::upstream::{self, About, Unverified, WebhookCall},
};

/// The greatest age of a webhook.
const OLDEST: Duration = Duration::from_secs(5 * 60);

/// How far the sender's clock may be ahead of ours.
const AHEAD: Duration = Duration::from_secs(60);

/// The event of a change of secrets. Other events have no effect.
const MODIFIED: &str = "secrets.modified";

/// Verifies the webhooks that are meant for this instance.
pub struct Webhook {
    secret: SecretValue,
    project_id: String,
    environment: String,
    tenants_path: String,
    folders: Vec<SharedFolder>,
}

#[derive(Deserialize)]
struct Body {
    event: Option<String>,
    project: Option<Object<Project>>,
    /// Milliseconds since 1970.
    timestamp: Option<i64>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Project {
    workspace_id: Option<String>,
    project_id: Option<String>,
    environment: Option<String>,
    secret_path: Option<String>,
}

impl Webhook {
    /// Reads the secret; `None` where none is configured.
    ///
    /// # Errors
    /// The secret cannot be read from its configured place.
    pub fn build(config: &Config, environment: &str) -> Result<Option<Self>, BuildError> {
        let Some(secret) = &config.webhook_secret else { return Ok(None) };
        Ok(Some(Self {
            secret: secret.resolve().map_err(BuildError::secret("infisical.webhook_secret"))?,
            project_id: config.project_id.clone(),
            environment: environment.to_owned(),
            tenants_path: config.tenants_path.clone(),
            folders: config.folders.clone(),
        }))
    }

    fn about(&self, event: Option<&str>, project: &Project) -> About {
        let is_ours = |id: &Option<String>| id.as_deref() == Some(&self.project_id);
        let ours = event == Some(MODIFIED)
            && (is_ours(&project.workspace_id) || is_ours(&project.project_id))
            && project.environment.as_deref() == Some(&self.environment);
        let Some(path) = project.secret_path.as_deref().filter(|_| ours) else { return About::Nothing };
        let (path, tenants) = (path.trim_end_matches('/'), self.tenants_path.trim_end_matches('/'));
        let below = |path: &'_ str, above: &str| {
            path.strip_prefix(above).filter(|rest| rest.is_empty() || rest.starts_with('/')).map(str::to_owned)
        };
        let is_in = |shared: &&SharedFolder| is_within(path, &shared.path);
        // Of one in another, the inner.
        if let Some(folder) = self.folders.iter().filter(is_in).max_by_key(|shared| shared.path.len()) {
            return folder.tenant().map_or(About::Nothing, About::Tenant);
        }
        if below(tenants, path).is_some() {
            return About::Tenants;
        }
        let below = below(path, tenants);
        let name = below.as_deref().and_then(|rest| rest.split('/').nth(1));
        name.and_then(|name| name.parse().ok()).map_or(About::Nothing, About::Tenant)
    }
}

impl upstream::Webhook for Webhook {
    fn longest_body(&self) -> u64 {
        64 << 10
    }

    fn header(&self) -> &'static str {
        "x-infisical-signature"
    }

    fn may_be_signature(&self, header: &str) -> bool {
        signature(header).is_some()
    }

    fn read(&self, header: Option<&str>, body: &[u8], now: Timestamp) -> Result<WebhookCall, Unverified> {
        let (at, signature) = header.and_then(signature).ok_or(Unverified::Forged)?;
        let mut mac = <Hmac<Sha256>>::new_from_slice(self.secret.expose().as_bytes())
            // HMAC takes a key of any length.
            .map_err(|_| Unverified::Forged)?;
        mac.update(body);
        // Compared in constant time.
        mac.verify_slice(&signature).map_err(|_| Unverified::Forged)?;
        let Object(body): Object<Body> = serde_json::from_slice(body).map_err(|_| Unverified::Unreadable)?;
        let signed_at = body.timestamp.map(Timestamp::from_millis).ok_or(Unverified::Outdated)?;
        if ![at, signed_at].iter().all(|at| now.since(*at) <= OLDEST && at.since(now) <= AHEAD) {
            return Err(Unverified::Outdated);
        }
        // The digest of the signature, not the signature itself: the stored value must not prove
        // anything.
        let digest = Sha256::digest(signature).into();
        Ok(WebhookCall { digest, about: self.about(body.event.as_deref(), &body.project.unwrap_or_default().0) })
    }
}

impl fmt::Debug for Webhook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Webhook").field("project_id", &self.project_id).finish_non_exhaustive()
    }
}

/// The time and the signature in `t=<ms>;<hex>`.
fn signature(header: &str) -> Option<(Timestamp, [u8; 32])> {
    let (at, digits) = header.strip_prefix("t=")?.split_once(';')?;
    let mut signature = [0; 32];
    hex::decode_to_slice(digits.trim(), &mut signature).ok()?;
    Some((Timestamp::from_millis(at.trim().parse().ok()?), signature))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::tiers::upstream::Webhook as _;

    const NOW: Timestamp = Timestamp::from_millis(1_800_000_000_000);

    fn webhook(tenants_path: &str) -> Webhook {
        Webhook {
            secret: SecretValue::new("hush".to_owned()),
            project_id: "p".to_owned(),
            environment: "prod".to_owned(),
            tenants_path: tenants_path.to_owned(),
            folders: vec![SharedFolder { name: "api".to_owned(), path: "/hono-api".to_owned() }],
        }
    }

    fn body(path: &str) -> Value {
        let project = json!({"workspaceId": "p", "projectId": "p", "environment": "prod", "secretPath": path});
        json!({"event": "secrets.modified", "project": project, "timestamp": NOW.as_millis()})
    }

    fn signed(body: &str, at: i64) -> String {
        let mut mac = <Hmac<Sha256>>::new_from_slice(b"hush").unwrap();
        mac.update(body.as_bytes());
        format!("t={at};{}", hex::encode(mac.finalize().into_bytes()))
    }

    fn read(webhook: &Webhook, body: &Value) -> Result<About, Unverified> {
        let text = body.to_string();
        let at = body["timestamp"].as_i64().unwrap_or(NOW.as_millis());
        webhook.read(Some(&signed(&text, at)), text.as_bytes(), NOW).map(|notice| notice.about)
    }

    #[test]
    fn a_path_names_the_tenant_whose_folder_it_is_or_is_below() {
        let tenant = |name: &str| About::Tenant(name.parse().unwrap());
        for (tenants_path, path, about) in [
            ("/tenants", "/tenants/acme", tenant("acme")),
            ("/tenants", "/tenants/acme/", tenant("acme")),
            ("/tenants", "/tenants/acme/sub/folder", tenant("acme")),
            ("/tenants", "/tenants", About::Tenants),
            ("/tenants", "/tenants/", About::Tenants),
            ("/tenants", "/", About::Tenants),
            ("/a/tenants", "/a", About::Tenants),
            ("/a/tenants", "/tenants/acme", About::Nothing),
            ("/tenants", "/tenantsacme", About::Nothing),
            ("/tenants", "/ten", About::Nothing),
            ("/tenants", "/tenants/Not One", About::Nothing),
            ("/tenants", "/hono-api", tenant("/api")),
            ("/tenants", "/hono-api/below", tenant("/api")),
            ("/tenants", "/hono-apis", About::Nothing),
            ("/", "/acme", tenant("acme")),
            ("/", "/", About::Tenants),
        ] {
            assert_eq!(read(&webhook(tenants_path), &body(path)), Ok(about), "{path} of {tenants_path}");
        }
    }

    #[test]
    fn another_project_environment_or_event_is_about_nothing_here() {
        let changed = |change: fn(&mut Value)| {
            let mut body = body("/tenants/acme");
            change(&mut body);
            read(&webhook("/tenants"), &body)
        };
        let one_is_enough = |body: &mut Value| body["project"]["workspaceId"] = Value::Null;
        assert!(matches!(changed(one_is_enough), Ok(About::Tenant(_))));
        for change in [
            (|body| body["event"] = json!("test")) as fn(&mut Value),
            |body| body["event"] = json!("secrets.rotation-failed"),
            |body| body["event"] = Value::Null,
            |body| body["project"] = Value::Null,
            |body| body["project"]["environment"] = json!("dev"),
            |body| (body["project"]["workspaceId"], body["project"]["projectId"]) = (json!("q"), json!("q")),
        ] {
            assert_eq!(changed(change), Ok(About::Nothing));
        }
    }

    #[test]
    fn a_notice_is_as_old_as_the_time_that_was_signed_whatever_the_header_says() {
        let webhook = webhook("/tenants");
        let at = |millis: i64| {
            let mut body = body("/tenants/acme");
            body["timestamp"] = json!(NOW.as_millis() + millis);
            body.to_string()
        };
        for (signed_at, header_at, is_taken) in [
            (0, 0, true),
            (-300_000, -300_000, true),
            (60_000, 60_000, true),
            (-300_001, 0, false),
            (60_001, 0, false),
            (0, -300_001, false),
            (0, 60_001, false),
            (-365 * 86_400_000, 0, false),
        ] {
            let text = at(signed_at);
            let told = webhook.read(Some(&signed(&text, NOW.as_millis() + header_at)), text.as_bytes(), NOW);
            let expected = if is_taken { Ok(()) } else { Err(Unverified::Outdated) };
            assert_eq!(told.map(drop), expected, "{signed_at} {header_at}");
        }
        let mut timeless = body("/tenants/acme");
        timeless["timestamp"] = Value::Null;
        assert_eq!(read(&webhook, &timeless), Err(Unverified::Outdated));
        for at in [i64::MIN, i64::MAX] {
            let text = at.to_string();
            let told = webhook.read(Some(&signed(&text, at)), text.as_bytes(), NOW);
            assert_eq!(told, Err(Unverified::Unreadable), "a number is no notice");
        }
        let list = json!(["secrets.modified", null, NOW.as_millis()]).to_string();
        let told = webhook.read(Some(&signed(&list, NOW.as_millis())), list.as_bytes(), NOW);
        assert_eq!(told, Err(Unverified::Unreadable), "nor is a list");
    }

    #[test]
    fn whatever_is_not_the_signature_of_these_bytes_proves_nothing() {
        let webhook = webhook("/tenants");
        let text = body("/tenants/acme").to_string();
        let good = signed(&text, NOW.as_millis());
        let first = webhook.read(Some(&good), text.as_bytes(), NOW).unwrap();
        let (time, digits) = good.split_once(';').unwrap();
        // The same webhook with its header in other forms is the same webhook.
        for same in [format!("{time};{}", digits.to_uppercase()), format!("t={};{digits}", NOW.as_millis() - 1)] {
            assert_eq!(webhook.read(Some(&same), text.as_bytes(), NOW).as_ref(), Ok(&first), "{same}");
        }
        let flipped = digits.replace(&digits[..1], if digits.starts_with('0') { "1" } else { "0" });
        for header in [
            None,
            Some(""),
            Some(digits),
            Some(time),
            Some(&*format!("{time};")),
            Some(&*format!("t=;{digits}")),
            Some(&*format!("t=now;{digits}")),
            Some(&*format!("{time};{}", &digits[2..])),
            Some(&*format!("{time};{digits}00")),
            Some(&*format!("{time};{flipped}")),
            Some(&*format!("{time};{}", "0".repeat(64))),
        ] {
            assert_eq!(webhook.read(header, text.as_bytes(), NOW), Err(Unverified::Forged), "{header:?}");
        }
        let other = text.replace("acme", "umbr");
        assert_eq!(webhook.read(Some(&good), other.as_bytes(), NOW), Err(Unverified::Forged));
        assert_eq!(webhook.read(Some(&good), format!("{text} ").as_bytes(), NOW), Err(Unverified::Forged));
    }
}
