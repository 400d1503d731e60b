//! The plainest way to one row: a prepared SELECT by primary key, through the libraries that
//! the product uses.

use diesel::{
    Connection as _, ExpressionMethods as _, QueryDsl as _, RunQueryDsl as _, SqliteConnection,
    connection::SimpleConnection as _,
};

use crate::fill::company_secrets;

/// A connection to a SQLite file.
pub(crate) struct Rows(SqliteConnection);

impl Rows {
    pub(crate) fn open(file: &str) -> Self {
        let mut connection = SqliteConnection::establish(file).unwrap();
        connection.batch_execute("PRAGMA busy_timeout = 5000").unwrap();
        Self(connection)
    }

    pub(crate) fn one(&mut self, id: &str) -> String {
        let row = company_secrets::table
            .filter(company_secrets::id.eq(id))
            .select(company_secrets::secret_value_encrypted)
            .first::<Option<String>>(&mut self.0);
        row.unwrap().unwrap()
    }

    /// Ids of rows, of so many.
    pub(crate) fn ids(&mut self, most: usize) -> Vec<String> {
        let most = i64::try_from(most).unwrap();
        company_secrets::table.select(company_secrets::id).limit(most).load(&mut self.0).unwrap()
    }
}

/// A connection to a PostgreSQL server.
pub(crate) struct Client {
    client: tokio_postgres::Client,
    statement: tokio_postgres::Statement,
}

impl Client {
    pub(crate) async fn connect(url: &str) -> Self {
        let (client, connection) = tokio_postgres::connect(url, tokio_postgres::NoTls).await.unwrap();
        tokio::spawn(connection);
        let text = "SELECT secret_value_encrypted FROM secretier.company_secrets WHERE id = $1";
        let statement = client.prepare(text).await.unwrap();
        Self { client, statement }
    }

    pub(crate) async fn one(&self, id: &str) -> String {
        self.client.query_one(&self.statement, &[&id]).await.unwrap().get(0)
    }

    pub(crate) async fn ids(&self, most: usize) -> Vec<String> {
        let text = format!("SELECT id FROM secretier.company_secrets LIMIT {most}");
        self.client.query(&text, &[]).await.unwrap().into_iter().map(|row| row.get(0)).collect()
    }
}
