//! What an application does with Infisical's SDK for Rust, unmodified: run by scripts/test-sdks.

use infisical::{
    AuthMethod, Client, InfisicalError,
    secrets::{CreateSecretRequest, DeleteSecretRequest, GetSecretRequest, ListSecretsRequest, UpdateSecretRequest},
};

const ACME: &str = "/tenants/acme";

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let given = |name: &str| std::env::var(name).expect(name);
    let project = given("PROJECT_ID");
    let project = project.as_str();
    let mut client = Client::builder().base_url(given("URL_OF_PROXY")).build().await.unwrap();
    client.login(AuthMethod::new_universal_auth(given("CLIENT_ID"), given("CLIENT_SECRET"))).await.unwrap();
    let secrets = client.secrets();
    let get = |name: &'static str| GetSecretRequest::builder(name, project, "dev").path(ACME).build();

    let listed = secrets.list(ListSecretsRequest::builder(project, "dev").path(ACME).build()).await.unwrap();
    let url = listed.iter().find(|secret| secret.secret_key == "DATABASE_URL").unwrap();
    assert!(url.secret_value.starts_with("postgres://"));
    assert_eq!(secrets.get(get("DATABASE_URL")).await.unwrap().secret_value, url.secret_value);
    for name in ["SDK_KEY", "odd name-é"] {
        let create = CreateSecretRequest::builder(name, "one", project, "dev").path(ACME).build();
        secrets.create(create).await.unwrap();
        assert_eq!(secrets.get(get(name)).await.unwrap().secret_value, "one");
        let update = UpdateSecretRequest::builder(name, project, "dev").path(ACME).secret_value("two").build();
        secrets.update(update).await.unwrap();
        assert_eq!(secrets.get(get(name)).await.unwrap().secret_value, "two");
        secrets.delete(DeleteSecretRequest::builder(name, project, "dev").path(ACME).build()).await.unwrap();
        is_refused(secrets.get(get(name)).await, 404);
    }
    let shared = secrets.list(ListSecretsRequest::builder(project, "dev").path("/hono-api").build()).await.unwrap();
    assert!(shared.iter().any(|secret| secret.secret_key == "SESSION_SECRET" && secret.secret_value.len() == 64));
    is_refused(secrets.list(ListSecretsRequest::builder(project, "dev").path("/tenants/globex").build()).await, 403);
    is_refused(secrets.get(get("NO_SUCH_SECRET")).await, 404);
}

fn is_refused<T>(outcome: Result<T, InfisicalError>, expected: u16) {
    match outcome {
        Err(InfisicalError::HttpError { status, .. }) => assert_eq!(status.as_u16(), expected),
        Err(error) => panic!("not {expected}: {error}"),
        Ok(_) => panic!("not {expected}: it was done"),
    }
}
