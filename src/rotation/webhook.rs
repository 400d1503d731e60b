//! A rotator that is reached over HTTP: one signed request a step.
//!
//! The requests are those of Standard Webhooks (<https://www.standardwebhooks.com>): `webhook-id` names
//! the rotation and the step, so a request whose answer was lost is asked again under the same id;
//! `webhook-signature` has an HMAC-SHA256 over id, time and body for each secret that is configured.

use std::time::Duration;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use hmac::{Hmac, KeyInit as _, Mac as _};
use http::{HeaderName, HeaderValue, StatusCode};
use serde::{Deserialize, Serialize};
use sha2::Sha256;
use zeroize::Zeroizing;

use crate::{
    answer::wiped_json,
    clock::Timestamp,
    log,
    outgoing::{Destination, InvalidDestination, Outgoing, OutgoingError, Reply},
    secret::SecretValue,
    setting::SecretSetting,
    tiers::database::{Rotation, RotationValues},
};

/// `rotator = { kind = "webhook", ... }`.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct WebhookConfig {
    /// Where the requests go: https, or this machine.
    pub url: String,
    /// The secret that signs them: `whsec_` and 24 to 64 bytes in base64. Several while it is changed.
    pub secret: Secrets,
}

/// One secret or several.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(untagged)]
pub enum Secrets {
    /// One.
    One(SecretSetting),
    /// Several: each signs.
    Several(Vec<SecretSetting>),
}

/// A rotator's answer to a step.
#[derive(Debug)]
pub(super) enum Said {
    /// It is done; at `create` with the value that the rotator has made, if it makes values.
    Done(Option<SecretValue>),
    /// It is not done yet: ask again.
    Later(Duration),
    /// The value has not the form that the provider wants.
    OtherForm,
}

/// Why a rotator has not done a step.
#[derive(Debug)]
pub(super) struct Refused {
    /// Whether it may pass by itself.
    pub(super) passes: bool,
    pub(super) code: &'static str,
    pub(super) text: String,
}

/// When a rotator that is not done is asked again, where it does not say.
const ASK_AGAIN: Duration = Duration::from_secs(10);

/// The body of a request. What a step needs is there, and nothing else.
#[derive(Serialize)]
struct Body<'a> {
    rotation: &'a str,
    step: &'a str,
    tenant: &'a str,
    key: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    candidate: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    current: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    previous: Option<&'a str>,
}

impl Secrets {
    fn all(&self) -> &[SecretSetting] {
        match self {
            Self::One(secret) => std::slice::from_ref(secret),
            Self::Several(secrets) => secrets,
        }
    }

    /// The keys, read anew each time: one in a file may be changed while instances run.
    fn keys(&self) -> Result<Vec<Zeroizing<Vec<u8>>>, String> {
        let key = |secret: &SecretSetting| {
            let text = secret.resolve().map_err(|error| log::chain(&error))?;
            let key =
                text.expose().strip_prefix("whsec_").and_then(|key| STANDARD.decode(key).ok()).map(Zeroizing::new);
            let wrong = || format!("{secret}: must be whsec_ and 24 to 64 random bytes in base64");
            key.filter(|key| (24..=64).contains(&key.len())).ok_or_else(wrong)
        };
        self.all().iter().map(key).collect()
    }
}

impl WebhookConfig {
    /// The faults of these settings, each beginning with the setting.
    pub(super) fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        faults.extend(self.destination().err().map(|error| format!("url: {error}")));
        match self.secret.keys() {
            Err(error) => faults.push(format!("secret: {error}")),
            Ok(keys) if keys.is_empty() => faults.push("secret: at least one".to_owned()),
            Ok(_) => {}
        }
        faults
    }

    /// Where the requests go.
    ///
    /// # Errors
    /// The address is none that a request goes to.
    pub(super) fn destination(&self) -> Result<Destination, InvalidDestination> {
        self.url.parse()
    }

    /// Asks for one step.
    pub(super) async fn ask(
        &self,
        outgoing: &Outgoing,
        rotation: &Rotation,
        step: &'static str,
        values: &RotationValues,
        now: Timestamp,
    ) -> Result<Said, Refused> {
        let lasting = |code, text| Refused { passes: false, code, text };
        let to = self.destination().map_err(|error| lasting("rotator_url", error.to_string()))?;
        let keys = self.secret.keys().map_err(|text| Refused { passes: true, code: "rotator_secret", text })?;
        let (old, new) = (values.old.as_ref().map(SecretValue::expose), values.new.as_ref().map(SecretValue::expose));
        let (candidate, current, previous) = match step {
            "create" => (None, old, None),
            "revoke" => (None, new, old),
            _ => (new, old, None),
        };
        let (tenant, key) = (rotation.tenant.as_str(), rotation.key.as_str());
        let body = wiped_json(&Body { rotation: &rotation.id, step, tenant, key, candidate, current, previous });
        // Another value is another question: under the old id there is an answer already.
        let id = match rotation.detail.made_anew {
            0 => format!("{}.{step}", rotation.id),
            anew => format!("{}.{step}.{anew}", rotation.id),
        };
        let headers = signed(&id, now.as_millis().div_euclid(1000), &body, &keys);
        let reply = outgoing.post(&to, headers, body).await.map_err(|error| unanswered(&error))?;
        answered(step, reply)
    }
}

/// The headers of a request.
fn signed(id: &str, seconds: i64, body: &[u8], keys: &[Zeroizing<Vec<u8>>]) -> Vec<(HeaderName, HeaderValue)> {
    let signatures: Vec<String> = keys
        .iter()
        .map(|key| {
            let mut mac = Hmac::<Sha256>::new_from_slice(key).expect("HMAC takes a key of any length");
            for part in [id.as_bytes(), b".", seconds.to_string().as_bytes(), b".", body] {
                mac.update(part);
            }
            format!("v1,{}", STANDARD.encode(mac.finalize().into_bytes()))
        })
        .collect();
    let headers = [
        ("webhook-id", id.to_owned()),
        ("webhook-timestamp", seconds.to_string()),
        ("webhook-signature", signatures.join(" ")),
    ];
    let header = |(name, value): (&'static str, String)| Some((HeaderName::from_static(name), value.try_into().ok()?));
    headers.into_iter().filter_map(header).collect()
}

fn unanswered(error: &OutgoingError) -> Refused {
    let passes = !matches!(error, OutgoingError::NotAllowed(_));
    Refused { passes, code: "rotator_unavailable", text: error.to_string() }
}

/// The meaning of an answer. Its body is read at `create` alone, and repeated nowhere.
fn answered(step: &'static str, Reply { status, body }: Reply) -> Result<Said, Refused> {
    #[derive(Deserialize)]
    struct Created {
        #[serde(default)]
        value: Option<String>,
    }
    match status {
        StatusCode::OK | StatusCode::NO_CONTENT if step != "create" || body.is_empty() => Ok(Said::Done(None)),
        StatusCode::OK => match serde_json::from_slice::<Created>(&body) {
            Ok(Created { value }) => Ok(Said::Done(value.map(SecretValue::new))),
            Err(_) => {
                let text = "the rotator answered create with something other than {\"value\":\"...\"}".to_owned();
                Err(Refused { passes: false, code: "rotator_answer", text })
            }
        },
        StatusCode::NO_CONTENT => Ok(Said::Done(None)),
        StatusCode::ACCEPTED => Ok(Said::Later(ASK_AGAIN)),
        StatusCode::UNPROCESSABLE_ENTITY => Ok(Said::OtherForm),
        StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS => Err(Refused {
            passes: true,
            code: "rotator_busy",
            text: format!("the rotator answered {step} with {status}"),
        }),
        status => Err(Refused {
            passes: !status.is_client_error(),
            code: "rotator_refused",
            text: format!("the rotator answered {step} with {status}"),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secrets(toml: &str) -> Secrets {
        #[derive(Deserialize)]
        struct Read {
            secret: Secrets,
        }
        toml::from_str::<Read>(toml).unwrap().secret
    }

    #[test]
    fn a_request_is_signed_as_the_specification_has_it() {
        // The example of the reference libraries of Standard Webhooks.
        let keys = secrets("secret = \"whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw\"").keys().unwrap();
        let body = br#"{"test": 2432232314}"#;
        let headers = signed("msg_p5jXN8AQM9LWM0D4loKWxJek", 1_614_265_330, body, &keys);
        let of = |name: &str| headers.iter().find(|(known, _)| known == name).unwrap().1.to_str().unwrap();
        assert_eq!(of("webhook-signature"), "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=");
        assert_eq!((of("webhook-id"), of("webhook-timestamp")), ("msg_p5jXN8AQM9LWM0D4loKWxJek", "1614265330"));

        let several =
            "secret = [\"whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw\", \"whsec_AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA\"]";
        let headers = signed("msg_p5jXN8AQM9LWM0D4loKWxJek", 1_614_265_330, body, &secrets(several).keys().unwrap());
        let signatures: Vec<&str> = headers[2].1.to_str().unwrap().split(' ').collect();
        assert!(signatures.len() == 2 && signatures[0] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=");
    }

    #[test]
    fn a_secret_that_signs_nothing_well_and_an_address_that_is_read_on_the_way_are_refused() {
        let faults = |url: &str, secret: &str| {
            let secret = secrets(&format!("secret = {secret}"));
            WebhookConfig { url: url.to_owned(), secret }.faults()
        };
        let good = "\"whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw\"";
        for url in ["https://rotator.internal/x", "http://127.0.0.1:1/", "http://localhost:8080/a"] {
            assert_eq!(faults(url, good), Vec::<String>::new());
        }
        for url in ["http://rotator.internal/x", "rotator", "https://me:pw@rotator.internal", "https://a/#b", "ftp://a"]
        {
            assert!(faults(url, good)[0].starts_with("url: "), "{url}");
        }
        for secret in ["\"MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw\"", "\"whsec_c2hvcnQ=\"", "\"whsec_%\"", "[]"] {
            let told = faults("https://rotator.internal/x", secret);
            assert!(told.len() == 1 && told[0].starts_with("secret: ") && !told[0].contains("MfKQ"), "{told:?}");
        }
    }

    #[test]
    fn an_answer_is_taken_for_what_it_says_and_its_body_is_repeated_nowhere() {
        let reply = |status: u16, body: &str| Reply {
            status: StatusCode::from_u16(status).unwrap(),
            body: Zeroizing::new(body.as_bytes().to_vec()),
        };
        let made = answered("create", reply(200, "{\"value\":\"made\",\"more\":1}"));
        assert!(matches!(made, Ok(Said::Done(Some(value))) if value.expose() == "made"));
        for body in ["", "{}", "{\"value\":null}"] {
            assert!(matches!(answered("create", reply(200, body)), Ok(Said::Done(None))), "{body}");
        }
        assert!(matches!(answered("set", reply(200, "made")), Ok(Said::Done(None))));
        assert!(matches!(answered("set", reply(202, "")), Ok(Said::Later(_))));
        assert!(matches!(answered("set", reply(422, "")), Ok(Said::OtherForm)));
        for (status, passes) in
            [(400, false), (404, false), (301, true), (429, true), (408, true), (500, true), (503, true)]
        {
            let Err(refused) = answered("test", reply(status, "hunter2")) else { panic!("{status}") };
            assert_eq!(refused.passes, passes, "{status}");
            assert!(!refused.text.contains("hunter2"), "{refused:?}");
        }
        assert!(matches!(answered("create", reply(200, "hunter2")), Err(refused) if !refused.text.contains("hunter2")));
    }
}
