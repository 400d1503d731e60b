DELETE FROM settings WHERE name = 'readable_from';
DROP TABLE rotation_due;
DROP TABLE secret_rotations;
