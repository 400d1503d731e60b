DROP TABLE ended_logins;
