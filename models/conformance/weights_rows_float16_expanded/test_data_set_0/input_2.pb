
Bper_sample_weightsJx<.;-º¹c:¤9—º6=“;f<¶û4