"""What an application does with Infisical's SDK for Python, unmodified: run by scripts/test-sdks."""

import os

from infisical_sdk import InfisicalSDKClient

where = {"project_id": os.environ["PROJECT_ID"], "environment_slug": "dev", "secret_path": "/tenants/acme"}
client = InfisicalSDKClient(host=os.environ["URL_OF_PROXY"])
client.auth.universal_auth.login(os.environ["CLIENT_ID"], os.environ["CLIENT_SECRET"])
secrets = client.secrets


def get(name):
    # Newer versions keep what they have read.
    if hasattr(client, "cache"):
        client.cache.enabled = False
    return secrets.get_secret_by_name(secret_name=name, **where)


def value(secret):
    return getattr(secret, "secret", secret).secretValue


def refused(asking, status):
    try:
        asking()
    except Exception as error:
        assert f"{status}" in str(error), f"not {status}: {error}"
        return
    raise AssertionError(f"not {status}: it was done")


listed = {secret.secretKey: secret.secretValue for secret in secrets.list_secrets(**where).secrets}
assert listed["DATABASE_URL"].startswith("postgres://"), sorted(listed)
assert value(get("DATABASE_URL")) == listed["DATABASE_URL"]
for name in ["SDK_KEY", "odd name-é"]:
    secrets.create_secret_by_name(secret_name=name, secret_value="one", **where)
    assert value(get(name)) == "one"
    secrets.update_secret_by_name(current_secret_name=name, secret_value="two", **where)
    assert value(get(name)) == "two"
    secrets.delete_secret_by_name(secret_name=name, **where)
    refused(lambda: get(name), 404)
shared = secrets.list_secrets(**{**where, "secret_path": "/hono-api"}).secrets
assert [len(secret.secretValue) for secret in shared if secret.secretKey == "SESSION_SECRET"] == [64]
refused(lambda: secrets.list_secrets(**{**where, "secret_path": "/tenants/globex"}), 403)
refused(lambda: get("NO_SUCH_SECRET"), 404)
