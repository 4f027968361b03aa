	
Bper_sample_weightsJO¿T²¹7—1<ã¿lÀ»>v¸