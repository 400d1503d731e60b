DROP TABLE instances;
DROP TABLE master_keys;
DROP TABLE access_tokens;
DROP TABLE company_secrets;
DROP TABLE company_data_keys;
DROP TABLE companies;
DROP TABLE counters;
DROP TABLE settings;
