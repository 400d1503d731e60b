//! Fills a database with tenants and their secrets, as the product would have left them: each
//! tenant with a data key of its own, each value sealed. Straight into the tables, for a
//! million takes too long otherwise.

use diesel::{
    Connection as _, ExpressionMethods as _, Insertable, RunQueryDsl as _, SqliteConnection,
    connection::SimpleConnection as _,
};
use secretier::{
    clock::Clock,
    sealing::{DataKey, KeyRing, MasterKey, Owner, Place as SealedPlace},
    secret::{SecretKey, SecretValue, Version},
    tenant::Tenant,
};
use uuid::Uuid;

use crate::stage::{Place, wait_for};

diesel::table! {
    companies (id) {
        id -> Text,
        subdomain -> Text,
        phase -> Nullable<Text>,
        created_at -> BigInt,
        updated_at -> BigInt,
    }
}

diesel::table! {
    company_data_keys (id) {
        id -> Text,
        company_id -> Text,
        version -> BigInt,
        wrapped_key -> Text,
        master_key_id -> Text,
        sealings -> BigInt,
        created_at -> BigInt,
    }
}

diesel::table! {
    company_secrets (id) {
        id -> Text,
        company_id -> Text,
        secret_key -> Text,
        secret_value_encrypted -> Nullable<Text>,
        version -> BigInt,
        source -> Text,
        created_at -> BigInt,
        updated_at -> BigInt,
    }
}

diesel::table! {
    tenant_uses (subdomain) {
        subdomain -> Text,
        used_at -> BigInt,
    }
}

/// So many tenants alike, named by a prefix and a number.
#[derive(Clone, Copy)]
pub(crate) struct Shape<'a> {
    pub(crate) prefix: &'a str,
    pub(crate) tenants: usize,
    pub(crate) keys: usize,
    /// Bytes of a value.
    pub(crate) value: usize,
}

impl Shape<'_> {
    pub(crate) fn tenant(&self, number: usize) -> String {
        format!("{}{number}", self.prefix)
    }

    pub(crate) fn path(&self, tenant: usize, key: usize) -> String {
        format!("/v1/tenants/{}/secrets/{}", self.tenant(tenant), key_name(key))
    }

    pub(crate) fn count(&self) -> usize {
        self.tenants * self.keys
    }

    /// So many paths, no two alike, from all over.
    pub(crate) fn spread(&self, most: usize) -> Vec<String> {
        let (count, most) = (self.count(), most.min(self.count()));
        // A step that has no divisor in common with the count comes by everything once.
        let step = (count / 3..).map(|step| step * 2 + 1).find(|&step| gcd(step, count) == 1).unwrap();
        let places = (0..most).map(|turn| turn * step % count);
        places.map(|place| self.path(place / self.keys, place % self.keys)).collect()
    }
}

fn gcd(one: usize, other: usize) -> usize {
    if other == 0 { one } else { gcd(other, one % other) }
}

pub(crate) fn key_name(number: usize) -> String {
    format!("KEY_{number}")
}

/// A value of so many bytes that JSON writes as they are.
pub(crate) fn value(bytes: usize, number: usize) -> String {
    let mut value = format!("{number}-");
    value.truncate(bytes);
    value.extend(std::iter::repeat_n('v', bytes - value.len()));
    value
}

#[derive(Insertable)]
#[diesel(table_name = companies)]
struct Company {
    id: String,
    subdomain: String,
    phase: &'static str,
    created_at: i64,
    updated_at: i64,
}

#[derive(Insertable)]
#[diesel(table_name = company_data_keys)]
struct WrappedKey {
    id: String,
    company_id: String,
    version: i64,
    wrapped_key: String,
    master_key_id: String,
    sealings: i64,
    created_at: i64,
}

#[derive(Insertable)]
#[diesel(table_name = company_secrets)]
struct Sealed {
    id: String,
    company_id: String,
    secret_key: String,
    secret_value_encrypted: String,
    version: i64,
    source: &'static str,
    created_at: i64,
    updated_at: i64,
}

/// Some tenants with all that is theirs.
#[derive(Default)]
pub(crate) struct Batch {
    companies: Vec<Company>,
    keys: Vec<WrappedKey>,
    secrets: Vec<Sealed>,
}

/// Fills the database of a place in which no instance runs yet. The tenants are the
/// database's own, as a migration leaves them, and were all asked for lately.
pub(crate) fn fill(place: &Place, shape: Shape<'_>) {
    const TOGETHER: usize = 10_000;
    let mut target = Target::open(&place.database);
    for batch in sealed(place, shape, TOGETHER.div_ceil(shape.keys)) {
        target.write(batch);
    }
    target.end();
}

/// The rows, so many tenants at a time.
pub(crate) fn sealed(place: &Place, shape: Shape<'_>, together: usize) -> impl Iterator<Item = Batch> {
    let ring = KeyRing::new(vec![MasterKey::parse(&place.master_key).unwrap()]);
    let now = Clock::system().now().as_millis();
    (0..shape.tenants).step_by(together).map(move |first| {
        let mut batch = Batch::default();
        for number in first..(first + together).min(shape.tenants) {
            add(&mut batch, &ring, shape, number, now);
        }
        batch
    })
}

fn add(batch: &mut Batch, ring: &KeyRing, shape: Shape<'_>, number: usize, now: i64) {
    let (company_id, tenant) = (Uuid::new_v4().to_string(), shape.tenant(number).parse::<Tenant>().unwrap());
    let data_key = DataKey::generate(1).unwrap();
    let (wrapped_key, master) = ring.wrap(&data_key, Owner { company_id: &company_id, tenant: &tenant }).unwrap();
    for place in 0..shape.keys {
        let key: SecretKey = key_name(place).parse().unwrap();
        let secret = SecretValue::new(value(shape.value, number * shape.keys + place));
        let at = SealedPlace { company_id: &company_id, key: &key, version: Version::FIRST };
        batch.secrets.push(Sealed {
            id: Uuid::new_v4().to_string(),
            company_id: company_id.clone(),
            secret_key: key.as_str().to_owned(),
            secret_value_encrypted: data_key.seal(&secret, at).unwrap(),
            version: 1,
            source: "infisical",
            created_at: now,
            updated_at: now,
        });
    }
    batch.keys.push(WrappedKey {
        id: Uuid::new_v4().to_string(),
        company_id: company_id.clone(),
        version: 1,
        wrapped_key,
        master_key_id: master.to_string(),
        sealings: i64::try_from(shape.keys).unwrap(),
        created_at: now,
    });
    let subdomain = tenant.as_str().to_owned();
    batch.companies.push(Company { id: company_id, subdomain, phase: "database", created_at: now, updated_at: now });
}

enum Target {
    Sqlite(SqliteConnection),
    Postgres(String),
}

impl Target {
    fn open(url: &str) -> Self {
        match url.strip_prefix("sqlite:") {
            None => Self::Postgres(url.to_owned()),
            Some(file) => {
                let mut connection = SqliteConnection::establish(file).unwrap();
                // A crash would leave half a database, which nobody would miss.
                connection.batch_execute("PRAGMA busy_timeout = 5000; PRAGMA synchronous = OFF").unwrap();
                Self::Sqlite(connection)
            }
        }
    }

    fn write(&mut self, batch: Batch) {
        match self {
            Self::Sqlite(connection) => batch.insert(connection),
            Self::Postgres(url) => wait_for(write_postgres(url, batch)),
        }
    }

    /// What the databases' own housekeeping would have done by the time there is so much.
    fn end(self) {
        match self {
            Self::Sqlite(mut connection) => connection.batch_execute("PRAGMA wal_checkpoint(TRUNCATE)").unwrap(),
            Self::Postgres(url) => wait_for(async {
                connect(&url).await.batch_execute("VACUUM ANALYZE").await.unwrap();
            }),
        }
    }
}

impl Batch {
    /// Writes it in one transaction, row by row, by statements that are prepared once.
    pub(crate) fn insert(self, connection: &mut SqliteConnection) {
        let wrote = connection.transaction(|connection| {
            for company in self.companies {
                let used = (tenant_uses::subdomain.eq(&company.subdomain), tenant_uses::used_at.eq(company.updated_at));
                diesel::insert_into(tenant_uses::table).values(used).execute(connection)?;
                diesel::insert_into(companies::table).values(company).execute(connection)?;
            }
            for key in self.keys {
                diesel::insert_into(company_data_keys::table).values(key).execute(connection)?;
            }
            for secret in self.secrets {
                diesel::insert_into(company_secrets::table).values(secret).execute(connection)?;
            }
            diesel::QueryResult::Ok(())
        });
        wrote.unwrap();
    }
}

async fn write_postgres(url: &str, batch: Batch) {
    let client = connect(url).await;
    let now = batch.companies[0].created_at;
    let texts = |each: &mut dyn Iterator<Item = &String>| each.cloned().collect::<Vec<_>>();
    let Batch { companies, keys, secrets } = &batch;
    let (ids, names) = (
        texts(&mut companies.iter().map(|company| &company.id)),
        texts(&mut companies.iter().map(|company| &company.subdomain)),
    );
    let text = "INSERT INTO companies (id, subdomain, phase, created_at, updated_at)
                SELECT id, name, 'database', $3, $3 FROM unnest($1::text[], $2::text[]) AS new (id, name)";
    client.execute(text, &[&ids, &names, &now]).await.unwrap();
    let text = "INSERT INTO tenant_uses (subdomain, used_at) SELECT name, $2 FROM unnest($1::text[]) AS new (name)";
    client.execute(text, &[&names, &now]).await.unwrap();
    let (ids, owners, wrapped, masters) = (
        texts(&mut keys.iter().map(|key| &key.id)),
        texts(&mut keys.iter().map(|key| &key.company_id)),
        texts(&mut keys.iter().map(|key| &key.wrapped_key)),
        texts(&mut keys.iter().map(|key| &key.master_key_id)),
    );
    let text =
        "INSERT INTO company_data_keys (id, company_id, version, wrapped_key, master_key_id, sealings, created_at)
                SELECT id, owner, 1, wrapped, master, $6, $5
                FROM unnest($1::text[], $2::text[], $3::text[], $4::text[]) AS new (id, owner, wrapped, master)";
    client.execute(text, &[&ids, &owners, &wrapped, &masters, &now, &keys[0].sealings]).await.unwrap();
    let (ids, owners, names, sealed) = (
        texts(&mut secrets.iter().map(|secret| &secret.id)),
        texts(&mut secrets.iter().map(|secret| &secret.company_id)),
        texts(&mut secrets.iter().map(|secret| &secret.secret_key)),
        texts(&mut secrets.iter().map(|secret| &secret.secret_value_encrypted)),
    );
    let text = "INSERT INTO company_secrets (id, company_id, secret_key, secret_value_encrypted, version, source, created_at, updated_at)
                SELECT id, owner, name, sealed, 1, 'infisical', $5, $5
                FROM unnest($1::text[], $2::text[], $3::text[], $4::text[]) AS new (id, owner, name, sealed)";
    client.execute(text, &[&ids, &owners, &names, &sealed, &now]).await.unwrap();
}

async fn connect(url: &str) -> tokio_postgres::Client {
    let (client, connection) = tokio_postgres::connect(url, tokio_postgres::NoTls).await.unwrap();
    tokio::spawn(connection);
    client.batch_execute("SET search_path TO secretier").await.unwrap();
    client
}
