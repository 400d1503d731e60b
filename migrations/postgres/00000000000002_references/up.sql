-- What upstream holds where it refers to other secrets, sealed: 'secret_value_encrypted' beside
-- it is what it stood for when it was read.
ALTER TABLE company_secrets ADD COLUMN secret_text_encrypted TEXT;

-- Why upstream's secret cannot be used, in a row of source 'forgotten': to an instance of the
-- version before, that is a secret which upstream is to be asked for.
ALTER TABLE company_secrets ADD COLUMN unusable TEXT;
