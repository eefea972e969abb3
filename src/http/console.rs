//! The console: one page that asks the JSON API and shows what it says. It holds no data, so
//! everybody may have it; the data are shown to who may ask the API.

use bytes::Bytes;
use http_body_util::Full;
use hyper::Response;
use hyper::header::{CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderValue, REFERRER_POLICY};

/// What the page may do: run our script, use our style, ask this server. Nothing from elsewhere,
/// nothing written into the page, and no other site may show it in a frame.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; \
                      img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// The file of the console at that path, if it has one.
pub(super) fn file(path: &str) -> Option<Response<Full<Bytes>>> {
    let (kind, text) = match path {
        "/" => ("text/html; charset=utf-8", include_str!("console/index.html")),
        "/console.css" => ("text/css; charset=utf-8", include_str!("console/console.css")),
        "/console.js" => ("text/javascript; charset=utf-8", include_str!("console/console.js")),
        "/icon.svg" => ("image/svg+xml", include_str!("console/icon.svg")),
        _ => return None,
    };
    let mut page = Response::new(Full::new(Bytes::from_static(text.as_bytes())));
    let headers = page.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    headers.insert(CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY));
    headers.insert(REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    Some(page)
}
