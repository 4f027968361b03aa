	
Bper_sample_weightsJð»—³Û7a8*Ú=F¤b²<