//! bench
#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "what fails here ends the run")]
mod bare;

#[tokio::main]
async fn main() {
    let body = std::env::args().nth(2).and_then(|n| n.parse().ok()).unwrap_or(100);
    bare::serve(body).await;
}
