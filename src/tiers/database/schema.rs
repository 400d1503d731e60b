//! The tables, as `migrations/` makes them on both databases.

diesel::table! {
    settings (name) {
        name -> Text,
        value -> Text,
    }
}

diesel::table! {
    counters (name) {
        name -> Text,
        value -> BigInt,
    }
}

diesel::table! {
    changes (number) {
        number -> BigInt,
        what -> Text,
        subdomain -> Nullable<Text>,
        secret_key -> Nullable<Text>,
        made_by -> Text,
        mark -> Nullable<BigInt>,
    }
}

diesel::table! {
    tenant_uses (subdomain) {
        subdomain -> Text,
        used_at -> BigInt,
    }
}

diesel::table! {
    leases (name) {
        name -> Text,
        holder -> Text,
        shown -> Text,
        token -> BigInt,
        until -> BigInt,
        locked -> Bool,
    }
}

diesel::table! {
    notices (digest) {
        digest -> Binary,
        received_at -> BigInt,
    }
}

diesel::table! {
    companies (id) {
        id -> Text,
        subdomain -> Text,
        phase -> Nullable<Text>,
        snapshot_at -> Nullable<BigInt>,
        snapshot_etag -> Nullable<Text>,
        snapshot_whole -> Bool,
        denied_at -> Nullable<BigInt>,
        shredded_at -> Nullable<BigInt>,
        phase_change -> Nullable<BigInt>,
        generation -> BigInt,
        created_at -> BigInt,
        updated_at -> BigInt,
        head -> Nullable<Text>,
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
        previous_version_id -> Nullable<Text>,
        source -> Text,
        written_by -> Nullable<Text>,
        created_at -> BigInt,
        updated_at -> BigInt,
        superseded_at -> Nullable<BigInt>,
        secret_text_encrypted -> Nullable<Text>,
        unusable -> Nullable<Text>,
        counted -> Nullable<Bool>,
    }
}

diesel::table! {
    access_tokens (id) {
        id -> Text,
        name -> Text,
        hash -> Binary,
        tenants -> Text,
        keys -> Text,
        actions -> Text,
        expires_at -> Nullable<BigInt>,
        created_at -> BigInt,
        revoked_at -> Nullable<BigInt>,
        last_used_at -> Nullable<BigInt>,
        replaced_by -> Nullable<Text>,
        seal -> Nullable<Text>,
    }
}

diesel::table! {
    ended_logins (id) {
        id -> Text,
        token_id -> Text,
        until -> BigInt,
    }
}

diesel::table! {
    master_keys (id) {
        id -> Text,
        source -> Text,
        first_seen_at -> BigInt,
        last_seen_at -> BigInt,
    }
}

diesel::table! {
    instances (id) {
        id -> Text,
        name -> Text,
        master_keys -> Text,
        changes -> BigInt,
        seen_at -> BigInt,
        version -> Nullable<Text>,
        max_detached -> Nullable<BigInt>,
    }
}

diesel::table! {
    upstream_writes (id) {
        id -> Text,
        subdomain -> Text,
        until -> BigInt,
    }
}

diesel::table! {
    migration_runs (id) {
        id -> Text,
        kind -> Text,
        options -> Text,
        started_by -> Text,
        total -> BigInt,
        started_at -> BigInt,
        seen_at -> BigInt,
        ended_at -> Nullable<BigInt>,
    }
}

diesel::table! {
    migration_tenants (subdomain) {
        subdomain -> Text,
        run_id -> Text,
        step -> Text,
        secrets -> BigInt,
        digest -> Nullable<Text>,
        reason -> Nullable<Text>,
        error -> Nullable<Text>,
        phase_before -> Nullable<Text>,
        verified_at -> Nullable<BigInt>,
        switched_at -> Nullable<BigInt>,
        updated_at -> BigInt,
        shadow_compared -> BigInt,
        shadow_different -> BigInt,
        shadow_different_at -> Nullable<BigInt>,
    }
}

diesel::table! {
    audit_records (chain, seq) {
        chain -> Text,
        seq -> BigInt,
        first_at -> BigInt,
        at -> BigInt,
        count -> BigInt,
        actor_id -> Nullable<Text>,
        actor_name -> Nullable<Text>,
        action -> Text,
        tenant -> Nullable<Text>,
        secret_key -> Nullable<Text>,
        outcome -> Text,
        tier -> Nullable<Text>,
        detail -> Text,
        hash -> Binary,
        signed_with -> Nullable<Text>,
        signature -> Nullable<Binary>,
    }
}

diesel::table! {
    audit_chains (chain) {
        chain -> Text,
        start_seq -> BigInt,
        start_hash -> Binary,
        start_signed_with -> Nullable<Text>,
        start_signature -> Nullable<Binary>,
        seq -> BigInt,
        hash -> Binary,
        vouched_seq -> Nullable<BigInt>,
        vouched_hash -> Nullable<Binary>,
        signed_with -> Nullable<Text>,
        signature -> Nullable<Binary>,
    }
}

diesel::table! {
    secret_rotations (id) {
        id -> Text,
        company_id -> Text,
        secret_key -> Text,
        kind -> Text,
        state -> Text,
        step -> Text,
        turn -> BigInt,
        next_try_at -> Nullable<BigInt>,
        old_version -> Nullable<BigInt>,
        old_value -> Nullable<Text>,
        new_value -> Nullable<Text>,
        valid_until -> Nullable<BigInt>,
        told_by -> Nullable<BigInt>,
        created_at -> BigInt,
        ended_at -> Nullable<BigInt>,
        detail -> Text,
    }
}

diesel::table! {
    rotation_due (company_id, secret_key) {
        company_id -> Text,
        secret_key -> Text,
        due_at -> BigInt,
    }
}

diesel::allow_tables_to_appear_in_same_query!(
    companies,
    company_secrets,
    company_data_keys,
    migration_tenants,
    rotation_due,
    secret_rotations,
    upstream_writes
);
