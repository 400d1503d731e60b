//! Logins and tokens, and the server's own state.

use serde_json::{Value, json};

use super::{exchange::Reply, fields::Fields, routes::Asked, tokens::Tokens, world::State};

pub(super) fn status(asked: &Asked<'_>) -> Value {
    json!({
        "date": asked.state.clock.now().to_rfc3339(),
        "message": "Ok",
        "emailConfigured": false,
        "inviteOnlySignup": true,
        "redisConfigured": true,
        "secretScanningConfigured": false,
    })
}

pub(super) fn login(asked: &mut Asked<'_>) -> Result<Value, Reply> {
    let mut fields = Fields::of_body(asked.body)?;
    let client_id = fields.required("clientId");
    let client_secret = fields.required("clientSecret");
    fields.check()?;

    let State { tokens, identities, clock, .. } = &mut *asked.state;
    let identity = identities
        .iter()
        .find(|identity| identity.client_id == client_id && identity.client_secret == client_secret)
        .ok_or_else(|| Reply::error(403, "UnauthorizedError", "Invalid credentials"))?;
    let token = tokens.issue(identity, clock.now());
    Ok(Tokens::grant(identity, &token))
}

pub(super) fn renew(asked: &mut Asked<'_>) -> Result<Value, Reply> {
    let token = access_token(asked)?;
    let State { tokens, identities, clock, .. } = &mut *asked.state;
    let identity = tokens.renew(&token, identities, clock.now())?;
    Ok(Tokens::grant(identity, &token))
}

pub(super) fn revoke(asked: &mut Asked<'_>) -> Result<Value, Reply> {
    let token = access_token(asked)?;
    let now = asked.state.clock.now();
    asked.state.tokens.revoke(&token, now)?;
    Ok(json!({"message": "Successfully revoked access token"}))
}

fn access_token(asked: &Asked<'_>) -> Result<String, Reply> {
    let mut fields = Fields::of_body(asked.body)?;
    let token = fields.required("accessToken");
    fields.check()?;
    Ok(token)
}
