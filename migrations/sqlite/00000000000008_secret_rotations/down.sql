UPDATE settings SET value = '00000000000001' WHERE name = 'readable_from';
DROP TABLE rotation_due;
DROP TABLE secret_rotations;
