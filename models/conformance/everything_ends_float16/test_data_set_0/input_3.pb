	
Bper_sample_weightsJµ>*·Ä·µ¸Œ;W·š+¤º8