//! Hyper as bare as it gets: one body, for whatever is asked. What a memory hit is held to.

use std::convert::Infallible;

use bytes::Bytes;
use http_body_util::Full;
use hyper::{Request, Response, body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;

/// Serves until the process is ended, and says on standard output where.
pub(crate) async fn serve(body: usize) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    println!("http://{}", listener.local_addr().unwrap());
    let body = Bytes::from(vec![b'x'; body]);
    loop {
        let Ok((stream, _)) = listener.accept().await else { continue };
        let _ = stream.set_nodelay(true);
        let body = body.clone();
        tokio::spawn(async move {
            let answer = service_fn(|_: Request<Incoming>| {
                std::future::ready(Ok::<_, Infallible>(Response::new(Full::new(body.clone()))))
            });
            let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), answer).await;
        });
    }
}
