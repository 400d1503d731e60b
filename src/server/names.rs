//! The forms of names, as the API's description writes them.

use utoipa::openapi::schema::{Array, ArrayBuilder, Object, ObjectBuilder, Type};

use crate::{secret::SecretKey, tenant::Tenant};

/// A tenant's name.
pub(super) fn tenant() -> Object {
    let form = ObjectBuilder::new().schema_type(Type::String).pattern(Some("^[a-z0-9][a-z0-9_-]*$"));
    form.min_length(Some(1)).max_length(Some(Tenant::MAX_LEN)).build()
}

/// A secret's name. Its length is in bytes, of which a letter may have more than one.
pub(super) fn key() -> Object {
    let form = ObjectBuilder::new().schema_type(Type::String).pattern(Some(r"^[^\u0000-\u001f\u007f-\u009f]+$"));
    form.min_length(Some(1)).max_length(Some(SecretKey::MAX_LEN)).build()
}

/// Up to so many secrets' names.
pub(super) fn keys(most: usize, description: &str) -> Array {
    ArrayBuilder::new().description(Some(description)).items(key()).max_items(Some(most)).build()
}
