
Bper_sample_weightsJûµ;´X@ã«•8@<6¼Î>»·ž9