ALTER TABLE company_secrets DROP COLUMN unusable;
ALTER TABLE company_secrets DROP COLUMN secret_text_encrypted;
